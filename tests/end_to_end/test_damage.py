"""Whatever part of a run is lost or altered: it is named with unit and rows, and the same command makes it anew."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actors.run_stage import StageStopped
from launch.config import make_config
from launch.job import score
from launch.run import Run
from storage.journal import Journal
from storage.locations import Location
from storage.verify import verify
from tests.end_to_end.answers import digests
from tests.end_to_end.conftest import Settings, run_job
from tests.end_to_end.test_same_result import ARTEFACTS

Harm = Callable[[Location, str], None]


def lose(run: Location, key: str) -> None:
    run.delete(key)


def cut(run: Location, key: str) -> None:
    run.replace(key, run.read(key)[:-3])


def flip(run: Location, key: str) -> None:
    data = bytearray(run.read(key))
    data[len(data) // 2] ^= 4
    run.replace(key, bytes(data))


HARMS = {lose: "is missing", cut: "bytes", flip: "is altered"}
OBJECTS = {
    "gradients": (
        "gradients/train/checkpoint-20/000000.0/rows/c/1/0",
        "collect-train",
        "rows 16:32 of segment 000000.0",
    ),
    "state": ("states/scores/checkpoint-30.safetensors", "prepare-scores", None),
    "scores": ("scores/scores/shards/000000.0-000000032.safetensors", "score-scores", "rows 32:45 of segment 000000.0"),
    "index": ("index/scores/by_query.parquet", "index-scores", None),
    "corpus": ("corpus/train/000000.0/rows.parquet", "ingest-train", "rows 0:45, ids from 0"),
    "queries": ("corpus/asked/000000.0/rows.parquet", "ingest-asked", "rows 0:5, ids from 0"),
}


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every object of an undisturbed run."""
    from tests.end_to_end.conftest import tiny_job

    run = run_job(tiny_job(inputs, tmp_path_factory.mktemp("whole") / "run"))
    return digests(run, "")


@pytest.fixture
def harmed(settings: Settings, whole: dict[str, bytes]) -> Run:
    """A copy of that run, to be harmed."""
    place = Location.parse(settings()["run"])
    for key, data in whole.items():
        place.replace(key, data)
    return Run.open(place.uri)


@pytest.mark.parametrize("store", [True, False])
def test_a_run_that_is_whole_is_found_so(settings: Settings, store: bool) -> None:
    run = run_job(settings(gradients={"store": store}))
    found = verify(run.location)
    assert not found.damages
    assert found.objects >= 15
    run_job(settings(gradients={"store": store}))
    assert not run.location.list("scores/scores/blocks"), "blocks are gone on purpose"


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", OBJECTS)
def test_damage_is_named_and_mended_by_running_again(
    settings: Settings, harmed: Run, whole: dict[str, bytes], what: str, harm: Harm
) -> None:
    key, stage, rows = OBJECTS[what]
    run = harmed.location
    harm(run, key)
    [damage] = verify(run).damages
    assert (damage.key, damage.stage, damage.rows) == (key, stage, rows)
    assert HARMS[harm] in damage.what
    assert [one.what for one in verify(run).damages] == ["waits to be made anew"], "a second look finds it noted"
    said: list[str] = []
    score(make_config(settings()), said.append)
    assert {k: d for k, d in digests(harmed, *ARTEFACTS).items() if d != whole[k]} == {}
    assert not verify(run).damages
    assert damage.unit is not None
    assert "done.1" in str(run.list(f"journal/{stage}/{damage.unit}"))


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["gradients", "state"])
def test_damage_met_on_the_way_is_mended_by_running_again(
    settings: Settings, harmed: Run, whole: dict[str, bytes], what: str, harm: Harm
) -> None:
    key, stage, _ = OBJECTS[what]
    harm(harmed.location, key)
    other = settings(output={"label": "other"})
    if what == "state":  # read again only by the same label
        other = settings()
        for noted in harmed.location.list("journal/score-scores") + harmed.location.list("journal/index-scores"):
            harmed.location.delete(noted)
    with pytest.raises(StageStopped, match=rf"of unit .*checkpoint-[23]0.* of stage {stage}\. Run the job .* again"):
        score(make_config(other), lambda _: None)
    assert len(Journal(harmed.location, stage).damaged()) == 1
    score(make_config(other), lambda _: None)
    assert harmed.location.read(key) == whole[key]


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("store", [True, False])
def test_damaged_scores_met_by_the_index_are_mended_by_running_again(
    settings: Settings, store: bool, harm: Harm
) -> None:
    """The driver itself reads them, no worker."""
    config = settings(gradients={"store": store})
    run = run_job(config)
    before = digests(run, *ARTEFACTS)
    for noted in run.location.list("index") + run.location.list("journal/index-scores"):
        run.location.delete(noted)
    harm(run.location, OBJECTS["scores"][0])
    with pytest.raises(OSError, match="It is of unit train-000000.0-000000032 of stage score-scores. Run the job of"):
        score(make_config(config), lambda _: None)
    score(make_config(config), lambda _: None)
    assert digests(run, *ARTEFACTS) == before


def test_a_shard_scored_without_a_store_gets_its_blocks_again(settings: Settings) -> None:
    config = settings(gradients={"store": False})
    run = run_job(config)
    before = digests(run, *ARTEFACTS)
    flip(run.location, OBJECTS["scores"][0])
    assert len(verify(run.location).damages) == 1
    assert len(Journal(run.location, "compute-scores").damaged()) == 3
    run_job(config)
    assert digests(run, *ARTEFACTS) == before
    assert not verify(run.location).damages


def test_other_bytes_of_a_rebuilt_unit_are_said(
    settings: Settings, harmed: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from actors import collect

    whole = collect.shard_gradients

    def other(*args):
        block, bad = whole(*args)
        block.losses[:] += 1e-6
        return block, bad

    lose(harmed.location, OBJECTS["gradients"][0])
    verify(harmed.location)
    monkeypatch.setattr(collect, "shard_gradients", other)
    run_job(settings())
    shown = capsys.readouterr()
    assert "is made anew with other bytes" in "".join((shown.out + shown.err).split("\n")).replace("  ", " ")
    assert not verify(harmed.location).damages


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
def test_metadata_of_the_store_is_written_again(settings: Settings, harmed: Run, harm: Harm) -> None:
    for key in (
        "gradients/train/checkpoint-10/000000.0/zarr.json",
        "gradients/train/checkpoint-20/000000.0/rows/zarr.json",
    ):
        before = harmed.location.read(key)
        harm(harmed.location, key)
        assert [one.key for one in verify(harmed.location).damages] == [key]
        run_job(settings())
        assert harmed.location.read(key) == before
