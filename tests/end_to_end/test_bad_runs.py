"""A run that cannot go on as asked: other checkpoints, another identity, a full disk, a holder. One message, nothing lost."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.run import Run
from storage import leases, local
from storage.leases import RunLease
from storage.locations import Location, to_json
from storage.run_format import NewerFormat
from tests.conftest import tiny_bert
from tests.end_to_end.answers import dense, digests
from tests.end_to_end.conftest import Settings, Told, run_job, small, write_texts


def test_a_checkpoint_of_another_architecture_in_the_list(
    settings: Settings, told: Told, inputs: Path, tmp_path: Path
) -> None:
    tiny_bert(hidden_size=12).save_pretrained(tmp_path / "wider")
    listed = [
        {"path": str(inputs / "model/checkpoint-10"), "learning_rate": 0.1},
        {"path": str(tmp_path / "wider"), "learning_rate": 0.1, "step": 11},
    ]
    assert "checkpoint wider is of another architecture than checkpoint-10" in told(
        small(settings, checkpoints={"path": listed})
    )
    run_job(small(settings))


def test_a_model_of_another_architecture_between_runs(
    settings: Settings, told: Told, tmp_path: Path, tokenizer_folder: Path
) -> None:
    run_job(small(settings))
    tiny_bert(hidden_size=12).save_pretrained(tmp_path / "wider")
    shutil.copytree(tokenizer_folder / "wrapped", tmp_path / "wider", dirs_exist_ok=True)
    message = told(small(settings, checkpoints={"path": str(tmp_path / "wider"), "learning_rate": 0.1}))
    assert "was made with architecture=" in message
    assert "Use another run, or restore that value." in message


def test_checkpoints_that_are_not_there_or_do_not_read(settings: Settings, told: Told, tmp_path: Path) -> None:
    assert "holds no checkpoint: looked for checkpoint-<step> folders" in told(
        small(settings, checkpoints={"path": str(tmp_path / "nowhere")})
    )
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/model.safetensors").write_bytes(b"\0" * 100)
    assert f"{tmp_path}/cut/model.safetensors" in told(small(settings, checkpoints={"path": str(tmp_path / "cut")}))
    listed = [{"path": str(tmp_path / "cut"), "learning_rate": "fast"}]
    assert "learning_rate='fast' of checkpoint 0 is not allowed" in told(small(settings, checkpoints={"path": listed}))


def test_weights_that_changed_since_the_run_began(settings: Settings, told: Told, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    shutil.copytree(inputs / "model", folder)
    config = small(settings, checkpoints={"path": str(folder)})
    run_job(config)
    shutil.copy(inputs / "model/checkpoint-30/model.safetensors", folder / "checkpoint-20/model.safetensors")
    message = told(config)
    assert "checkpoint checkpoint-20 of run" in message
    assert "was made with fingerprint=" in message
    shutil.copy(inputs / "model/checkpoint-20/model.safetensors", folder / "checkpoint-20/model.safetensors")
    run_job(config)


def test_folders_and_files_that_moved_or_are_spelled_otherwise_are_the_same(
    settings: Settings, inputs: Path, tmp_path: Path, told: Told
) -> None:
    shutil.copytree(inputs, tmp_path / "here")
    asked = {"path": str(tmp_path / "here/queries.jsonl")}
    paths = {
        "checkpoints": str(tmp_path / "here/model"),
        "corpus": str(tmp_path / "here/train.jsonl"),
        "queries": asked,
    }
    words = {"settings": {"max_tokens": 16, "tokenizer": str(tmp_path / "here/model/checkpoint-10")}}
    run = run_job(small(settings, **paths, task=words))
    before = digests(run, "gradients", "states", "scores", "index", "corpus")
    (tmp_path / "here").rename(tmp_path / "there")
    there = f"{tmp_path}/./there"
    moved = {"checkpoints": f"{there}/model/", "corpus": f"{there}/train.jsonl"}
    moved |= {"queries": {"path": f"{there}/queries.jsonl"}}
    words = {"settings": {"max_tokens": 16, "tokenizer": f"{there}/model/checkpoint-30"}}
    again = run_job(small(settings, **moved, task=words))
    assert digests(again, "gradients", "states", "scores", "index", "corpus") == before
    assert [c.uri.rpartition("/")[0] for c in again.checkpoints()] == [f"{tmp_path}/there/model"] * 3
    assert again.score(["the film was dull"], k=2)[0].proponents, "new texts are answered from where things lie now"
    write_texts(tmp_path / "there/train.jsonl", 44)
    assert "45 records were ingested before, the source now has only 44" in told(small(settings, **moved, task=words))


def test_another_runs_store_may_move_but_not_change(
    settings: Settings, told: Told, tmp_path: Path, inputs: Path
) -> None:
    own = run_job(small(settings, run=str(tmp_path / "first")))
    second = {"uri": settings()["run"], "store": own.location.uri}
    before = digests(run_job(small(settings, run=second)), "scores", "index")
    (tmp_path / "first").rename(tmp_path / "moved")
    second["store"] = str(tmp_path / "moved")
    assert digests(run_job(small(settings, run=second)), "scores", "index") == before
    fewer = write_texts(tmp_path / "fewer.jsonl", 30)
    run_job(small(settings, run=str(tmp_path / "other"), corpus=str(fewer)))
    second["store"] = str(tmp_path / "other")
    assert "was made with " in told(small(settings, run=second))


def test_a_config_that_fails_at_once_leaves_no_run(settings: Settings, told: Told, tmp_path: Path) -> None:
    gone = str(tmp_path / "nowhere")
    wrong = [
        {"checkpoints": gone}, {"corpus": gone}, {"queries": {"path": gone}},
        {"method": {"name": "gradient-dot", "checkpoint": 5}}, {"task": {"settings": {"tokenizer": gone}}},
    ]  # fmt: skip
    for sections in wrong:
        told(small(settings, **sections))
        assert not Path(settings()["run"]).exists(), sections


def test_a_run_of_a_later_version_is_refused(settings: Settings, told: Told) -> None:
    run = run_job(small(settings))
    manifest = run.location.read_json("manifest.json")
    assert manifest["format"] == 1
    run.location.replace("manifest.json", to_json(manifest | {"format": 2}))
    message = "is a run of format 2, this version reads up to 1. Install a later one, or use another run."
    assert message in told(small(settings))
    with pytest.raises(NewerFormat, match="format 2"):
        Run.open(run.location.uri)
    assert message in told(small(settings, run={"uri": settings()["run"] + "-new", "store": run.location.uri}))


def test_a_run_of_another_identity(settings: Settings, told: Told, inputs: Path, tmp_path: Path) -> None:
    run_job(small(settings))
    longer = told(small(settings, task={"settings": {"max_tokens": 12}}))
    assert "was made with max_tokens=16, this job has 12. Use another run, or restore that value." in longer
    other = told(small(settings, task={"name": "regression", "settings": {"target_field": "label"}}))
    assert "was made with" in other
    assert "task='text-classification', this job has 'regression'" in other
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (inputs / "model/checkpoint-10").glob("tokenizer*"):
        folder.joinpath(file.name).write_text(file.read_text().replace('"good": 11', '"well": 11'))
    asked = told(small(settings, task={"settings": {"max_tokens": 16, "tokenizer": str(folder)}}))
    assert "was made with tokenizer=" in asked
    run_job(small(settings))


def test_other_gradients_with_the_same_store(settings: Settings, told: Told) -> None:
    run_job(small(settings))
    message = told(small(settings, gradients={"modules": ["classifier"], "dim": 2}))
    assert "gradients.dim=16, this run has 2. Use another run, or gradients.dim=16." in message
    run_job(small(settings))


@pytest.mark.parametrize(
    ("where", "first", "seen", "use"),
    [
        (
            "corpus",
            1,
            "was made with source_id='r0' at",
            "A corpus may only grow at its end: use another run, or restore that value",
        ),
        ("queries", 0, "was made with content=", "Use another queries.name, or restore that value."),
    ],
)
def test_a_source_that_changed_under_the_same_name(
    settings: Settings, told: Told, tmp_path: Path, where: str, first: int, seen: str, use: str
) -> None:
    file = write_texts(tmp_path / "texts.jsonl", 6)
    config = small(settings, **{where: {"path": str(file)}})
    run_job(config)
    before = file.read_text()
    write_texts(file, 7, first)
    message = told(config)
    assert seen in message
    assert use in message
    file.write_text(before)
    run_job(config)


def test_another_runs_store_of_other_rows(settings: Settings, told: Told) -> None:
    own = run_job(small(settings))
    other = {"uri": settings()["run"] + "-other", "store": own.location.uri}
    assert "was built with run.seed=0, this run has 1" in told(small(settings, run=other | {"seed": 1}))
    message = told(small(settings, run=other, gradients={"modules": ["classifier"], "projection": "gaussian"}))
    assert 'gradients.projection="two-sided", this run has "gaussian"' in message
    run_job(small(settings, run=other))


def test_other_settings_under_the_same_label(settings: Settings, told: Told) -> None:
    run_job(small(settings))
    message = told(small(settings, output={"top_k": 3}))
    assert "was made with top_k=50, this job has 3. Use another output.label, or restore that value." in message
    assert "method.checkpoint=5 is not there" in told(small(settings, method={"name": "gradient-dot", "checkpoint": 5}))


def test_a_full_disk_stops_with_one_message_and_the_job_resumes(
    settings: Settings, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dense(run_job(small(settings, run=settings()["run"] + "-whole")))
    os_link, left = os.link, 30

    def link(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        os_link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(local.os, "link", link)
        message = told(small(settings))
    assert "No space left on device while writing" in message
    assert "Free some, then run again to resume." in message
    assert (dense(run_job(small(settings))) == expected).all()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a tiny disk needs root")
def test_a_disk_that_is_too_small(settings: Settings, told: Told, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        config = settings(run=str(disk / "run"))
        assert "No space left on device while writing" in told(config)
        assert not list(disk.rglob("*.partial")), "nothing half-written"
        subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
        run_job(config)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_folder_that_cannot_be_written(settings: Settings, told: Told, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert f"{tmp_path}/file" in told(small(settings, run=str(tmp_path / "file" / "run")))
    assert "read-only" in told(small(settings, run="package:numpy/run"))
    assert "location 'ftp://x/y' is not allowed" in told(small(settings, run="ftp://x/y"))


def test_a_run_that_another_live_process_wants_alone(
    settings: Settings, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.01)
    monkeypatch.setattr(leases, "POLL", 0.05)
    config = small(settings)
    with RunLease(Location.parse(config["run"]), driver="first", alone=True):
        message = told(config)
    assert f"is being worked on by first (process {os.getpid()} on" in message
    assert "Wait until it ends or stop it, or use another run." in message
    run_job(config)
