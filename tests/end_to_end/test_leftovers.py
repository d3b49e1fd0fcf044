"""A worker that was given up and goes on: it may end a unit that nobody else has, it undoes nothing."""

from typing import Any

import pytest

from actors import collect, score
from actors.context import WorkerContext
from actors.plan import checkpoint_units, shards
from actors.units import Unit
from launch import job
from launch.run import Run
from storage.corpus import Corpus
from storage.gradients import RowBlock
from storage.journal import Journal
from storage.leases import LeaseLost, RunLease, UnitClaims
from tests.end_to_end.answers import digests
from tests.end_to_end.conftest import Settings, run_job

SHARD_GRADIENTS = collect.shard_gradients


def other_bytes(*args: Any) -> tuple[RowBlock, dict[int, str]]:
    """What a machine of another type would have computed."""
    block, bad = SHARD_GRADIENTS(*args)
    block.losses[:] += 1e-6
    return block, bad


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The settings that each stage's units travelled with, by function."""
    seen: dict[str, dict[str, Any]] = {}
    run_stage = job.run_stage

    def spy(pool: Any, stage: Any, *rest: Any, **more: Any) -> Any:
        seen[stage.function] = stage.settings
        return run_stage(pool, stage, *rest, **more)

    monkeypatch.setattr(job, "run_stage", spy)
    return seen


def last_unit(run: Run) -> Unit:
    return checkpoint_units(("checkpoint-30",), shards(Corpus.open(run.location, "train"), 16), "train")[-1]


def test_a_unit_that_is_done_stays_as_it_is(
    settings: Settings, settings_of: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_job(settings())
    before = digests(run, "gradients")
    context, unit = WorkerContext(run.location.uri), last_unit(run)
    collect.collect_unit(context, settings_of["collect"], unit)  # the same bytes: nothing to do
    monkeypatch.setattr(collect, "shard_gradients", other_bytes)
    with pytest.raises(LeaseLost, match=r"unit checkpoint-30-train-000000\.0-000000032 of .* is done already"):
        collect.collect_unit(context, settings_of["collect"], unit)
    assert digests(run, "gradients") == before


def test_a_dead_drivers_worker_leaves_the_next_ones_objects_alone(
    settings: Settings, settings_of: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_job(settings())
    before = digests(run, "gradients")
    unit = last_unit(run)
    run.location.delete(f"journal/collect-train/{unit.key}/done.0")  # the next driver has written it, not yet noted it
    monkeypatch.setattr(collect, "shard_gradients", other_bytes)
    with RunLease(run.location) as lease:
        assert UnitClaims(lease, Journal(run.location, "collect-train")).take(unit.key)
        with pytest.raises(LeaseLost, match="another driver has taken unit"):
            collect.collect_unit(WorkerContext(run.location.uri), settings_of["collect"], unit)
    assert digests(run, "gradients") == before


@pytest.mark.parametrize("stage", ["collect", "score"])
def test_other_bytes_of_an_attempt_that_was_never_noted_make_way(
    settings: Settings, settings_of: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    run = run_job(settings())
    if stage == "collect":
        unit, key = last_unit(run), "gradients/train/checkpoint-30/000000.0/losses/c/2"
        journal, carry_out = "collect-train", collect.collect_unit
    else:
        unit = Unit(f"train-{last_unit(run).payload['segment']}-000000032", last_unit(run).payload)
        key, journal, carry_out = run.location.list("scores/scores/shards")[-1], "score-scores", score.score_unit
    right = run.location.read(key)
    run.location.delete(f"journal/{journal}/{unit.key}/done.0")
    run.location.replace(key, right[:-1] + b"?")
    receipt = carry_out(WorkerContext(run.location.uri), settings_of[stage], unit)
    assert run.location.read(key) == right
    assert key in {record["key"] for record in receipt.objects}
