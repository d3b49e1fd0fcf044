"""What `status` says of a run, and with which exit status."""

import json
import os
from pathlib import Path

import pytest

from launch import status
from launch.run import Run
from storage.leases import RunLease
from storage.locations import Location
from tests.end_to_end.conftest import Settings, run_job


def told(
    run: Run | str, capsys: pytest.CaptureFixture[str], *, verify: bool = False, as_json: bool = True
) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        status.main(run if isinstance(run, str) else run.location.uri, verify, as_json)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


def test_a_finished_run(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_job(settings())
    code, out = told(run, capsys, verify=True)
    report = json.loads(out)
    assert (code, report["state"], report["healthy"], report["drivers"]) == (0, "finished", True, [])
    collect = next(stage for stage in report["stages"] if stage["stage"] == "collect-train")
    assert (collect["done"], collect["units"], collect["rows"], collect["bad"], collect["damaged"]) == (9, 9, 135, 0, 0)
    assert 0 <= collect["age"] < 300
    assert report["verified"]["objects"] > 50
    code, out = told(run, capsys, verify=True, as_json=False)
    assert "collect-train   9 of 9" in out
    assert "objects read" in out


def test_features_and_a_retrained_last_layer_are_stages_too(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_job(settings(method={"name": "representer", "penalty": 0.01}))
    report = json.loads(told(run, capsys)[1])
    rows = {stage["stage"]: (stage["done"], stage["units"], stage["rows"]) for stage in report["stages"]}
    [features] = [name for name in rows if name.startswith("features-train-")]
    assert rows[features] == (3, 3, 45)
    assert rows["head-scores"] == (1, 1, 0)
    assert report["state"] == "finished"
    shown = [line.split()[0] for line in told(run, capsys, as_json=False)[1].splitlines()]
    assert shown.index("features-train") < shown.index("head-scores") < shown.index("score-scores")
    run.location.delete(next(key for key in run.location.list(f"journal/{features}") if "/done." in key))
    assert json.loads(told(run, capsys)[1])["state"] == "stalled"


def test_a_damaged_one_is_said_until_it_is_mended(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_job(settings())
    run.location.delete("gradients/train/checkpoint-20/000000.0/losses/c/1")
    assert told(run, capsys)[0] == 0, "not looked for"
    code, out = told(run, capsys, verify=True, as_json=False)
    assert code == 1
    assert (
        "losses/c/1 is missing (stage collect-train, unit checkpoint-20-train-000000.0-000000016, rows 16:32 of" in out
    )
    code, out = told(run, capsys)
    assert (code, json.loads(out)["state"]) == (1, "stalled")
    assert "8 of 9, 1 damaged" in told(run, capsys, as_json=False)[1]
    run_job(settings())
    assert told(run, capsys, verify=True)[0] == 0


def test_records_that_were_edited(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_job(settings())
    record = run.location.read("stages/score-scores.json")
    run.location.replace("stages/score-scores.json", record.replace(b'"top_k": 50', b'"top_k": 49'))
    code, out = told(run, capsys, verify=True)
    [damage] = json.loads(out)["verified"]["damages"]
    assert (code, damage["key"], damage["what"]) == (
        1, "stages/score-scores.json", "is altered: its hash is not the one recorded"
    )  # fmt: skip


def test_who_works_on_it(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_job(settings())
    with RunLease(run.location, "driver"):
        report = json.loads(told(run, capsys)[1])
        [driver] = report["drivers"]
        assert (report["state"], driver["pid"], driver["gone"]) == ("running", os.getpid(), False)
        assert f"driver driver (process {os.getpid()} on" in " ".join(told(run, capsys, as_json=False)[1].split())


def test_a_place_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(str(tmp_path), capsys)[0] == 2
    assert told("ftp://x", capsys)[0] == 2


def test_verify_holds_no_object_in_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_job(settings())
    whole: list[str] = []
    read = Location.read
    monkeypatch.setattr(Location, "read", lambda self, key="": whole.append(key) or read(self, key))
    status.verify(run.location)
    assert all(key.endswith((".json", "zarr.json")) or "/done." in key for key in whole), "the rest is streamed"
