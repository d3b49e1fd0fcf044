"""What is foretold of a job against what the job then leaves and takes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.methods.fastif import FastIF
from engine.methods.influence import Influence
from engine.methods.tracin import TracIn
from launch import estimate, forecast
from launch.config import load_config, make_config
from launch.estimate import assumed_seconds, index_rows, measured_seconds
from launch.footprint import Size
from launch.forecast import Times
from launch.job import score
from launch.plan import plan, refuse_unfit
from launch.probe import Probe, StageTime, count
from launch.solve_time import SolveTime, assumed_solve, measured_solve, probe_settings, scored_share
from storage.journal import Journal
from storage.locations import Location
from tests.end_to_end.conftest import QUERIES, ROWS, Settings

BILLION = Path(__file__).parents[2] / "configs" / "cluster" / "billion-words.yaml"


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.probe.BATCHES", 0)  # as few rows as a probe takes: 32 of 45


def left(run: Location, folder: str) -> int:
    return sum(run.size(key) for key in run.list(folder))


@pytest.mark.parametrize(
    "sections",
    [{}, {"gradients": {"store": False, "projection": "none", "norms": True}}, {"method": {"name": "gradient-cosine"}}],
    ids=["store", "no store", "one checkpoint"],
)
def test_units_and_bytes_are_those_of_the_job(settings: Settings, sections: dict[str, Any]) -> None:
    config = make_config(settings(**sections))
    made = plan(config)
    score(config, lambda _: None)
    run = Location(config.run.uri)
    assert made.size == Size(ROWS, made.size.tokens, QUERIES, 3, 16)
    assert sum(s["tokens"] for s in _segments(run)) == made.size.tokens
    for stage, units in made.units.items():
        name = f"{stage}-{'train' if stage == 'collect' else 'scores'}"
        assert len(Journal(run, name).done()) == units
    if made.bytes["gradients"]:
        assert made.bytes["gradients"] == left(run, "gradients") - run.size("gradients/store.json")
    assert made.bytes["scores"] == left(run, "scores")
    answers = run.size("states/scores/answers.json")
    assert abs(made.bytes["states"] - left(run, "states")) <= 0.2 * answers, "all but the answers' texts is exact"
    whole = left(run, "")
    assert abs(sum(made.bytes.values()) - whole) <= 0.05 * whole


def _segments(run: Location) -> list[dict[str, Any]]:
    return [run.read_json(key) for key in run.list("corpus/train") if key.endswith("segment.json")]


def test_the_probe_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    before = {*os.listdir("/tmp")}
    made = plan(make_config(settings()))
    assert not {name for name in {*os.listdir("/tmp")} - before if name.startswith("influence-plan-")}
    assert not (tmp_path / "run").exists()
    assert json.loads(json.dumps(made.record()))["times"][0]["device"] == "this machine"


PROBE = Probe(
    rows=80, tokens=800, queries=10, checkpoints=2, shard_rows=10,
    stages={
        "ingest": StageTime(0.9), "start": StageTime(5.0), "collect": StageTime(20.0, each=1.0, once=2.0, units=16),
        "prepare": StageTime(4.0, units=2), "score": StageTime(1.7, each=0.2, once=0.1, units=8),
        "other": StageTime(0.0), "index": StageTime(1.0),
    },
    solve=None, bytes={}, store=None, seen={}, peak_memory=0,
)  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_times_grow_with_the_work_and_are_shared(workers: int) -> None:
    size = Size(rows=800, tokens=16_000, queries=20, checkpoints=3, shard_rows=100)
    seconds = measured_seconds(PROBE, size, 3, 5, workers, TracIn())
    assert seconds["ingest"] == pytest.approx(0.9 * 820 / 90)
    assert seconds["start"] == 5.0
    # a token took 8 s / 800; 16,000 are under each checkpoint, which every worker also loads
    assert seconds["collect"] == pytest.approx(3 * (2.0 + 160 / workers))
    assert seconds["prepare"] == pytest.approx(2.0 * 2 * -(-3 // workers))
    # 8 × 0.2 s for 80 rows, 10 queries, 2 checkpoints
    assert seconds["score"] == pytest.approx(0.1 + 1.6 * 10 * 2 * 1.5 / workers)
    assert seconds["index"] == pytest.approx(index_rows(800, 20, 5) / index_rows(80, 10, 5))


def test_the_last_round_of_units_is_as_long_as_the_others() -> None:
    size = Size(rows=300, tokens=3000, queries=10, checkpoints=2, shard_rows=100)
    alone, shared = (measured_seconds(PROBE, size, 2, 5, n, TracIn())["collect"] for n in (1, 2))
    assert alone == pytest.approx(2 * (2 + 30))
    assert shared == pytest.approx(2 * (2 + 20)), "three units by two workers take two rounds"


def test_what_is_not_measured_follows_the_figures() -> None:
    size = Size(rows=100, tokens=1000, queries=10, checkpoints=2, shard_rows=10)
    assumed = {"efficiency": 0.5, "storage": 1e6, "index_rows": 100.0, "start": 7.0}
    seconds = assumed_seconds(size, 1, 5, 1e6, 1e8, 1e4, 4_000_000, assumed, 2, TracIn(), 0)
    assert seconds["collect"] == pytest.approx(2 * (20 / 2 + 4))
    slower = assumed_seconds(size, 1, 5, 1e6, 1e8, 1e6, 4_000_000, assumed, 2, TracIn(), 0)
    assert slower["collect"] == pytest.approx(2 * (100 / 2 + 4)), "storage is what takes longest"
    assert seconds["score"] == pytest.approx(1e4 * 100 / 1e6 / 2)
    without = assumed_seconds(size, 1, 5, 1e6, 1e8, 0, 4_000_000, assumed, 2, TracIn(), 0)
    assert without["compute"] == pytest.approx(20 / 2 + 4)


def test_a_billion_words_plan_without_gpu_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    made = plan(load_config(str(BILLION)))
    assert made.probe is None
    assert made.units == {"collect": 2 * 5087, "prepare": 2, "score": 5087}
    assert {(one.device, one.workers) for one in made.times} == {
        (d, n) for d in ("l4", "a100", "h100") for n in (1, 8, 64)
    }
    hours = {(one.device, one.workers): one.total / 3600 for one in made.times}
    assert hours["h100", 64] < hours["h100", 8] < hours["h100", 1] < hours["a100", 1] < hours["l4", 1]
    shape = estimate.build_shape("causal-lm", load_config(str(BILLION)).plan.model or {}, 1024)
    weights = shape.size - 2048 * 50304  # the embedding is looked up, not multiplied with
    products = 4 * weights * 1.0  # forward and activation-only backward
    attention = 24 * 4 * 1024 * 2048 * 3
    assert shape.flops_a_token() == pytest.approx(products + attention, rel=0.02)


def test_whole_gradients_that_are_not_stored_have_no_limit() -> None:
    one = ["method.name=gradient-dot", "gradients.projection=none", "gradients.norms=false"]
    with pytest.raises(ValueError, match="or no store"):
        plan(load_config(str(BILLION), one))
    assert plan(load_config(str(BILLION), [*one, "gradients.store=false"])).bytes["gradients"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.examples=null"], "plan.model needs plan.examples, plan.tokens and plan.queries"),
        (
            ["pretrain.corpus=a.jsonl", "pretrain.shared={w: w}", "method.name=multistage"],
            "plan does not know jobs of two stages",
        ),
        (["plan.devices=[gtx]"], "plan.devices='gtx' is not known: one of l4, a100, h100, h200"),
        (["task.name=image-classification", "task.settings=null"], "plan.model is not allowed with task image-class"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(load_config(str(BILLION), overrides))
    assert message in str(error.value)


def test_a_model_larger_than_every_device_is_refused() -> None:
    large = ["plan.model.num_hidden_layers=16", "plan.model.hidden_size=16384", "plan.model.intermediate_size=131072"]
    with pytest.raises(ValueError, match=r"a worker needs .* GiB, the largest device \(a100\) has 80.0 GiB: set"):
        plan(load_config(str(BILLION), large))


def test_a_run_larger_than_the_disk_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(settings())
    fits = SimpleNamespace(
        times=[Times("this machine", 1, {}, 1, 2)], bytes={"gradients": 3 << 30}, temporary=1 << 30, size=None
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 30))
    refuse_unfit(config, fits)  # type: ignore[arg-type]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 30))
    with pytest.raises(ValueError, match=r"will hold 4.0 GiB, .* has 3.0 GiB free: set a smaller gradients.dim"):
        refuse_unfit(config, fits)  # type: ignore[arg-type]


def test_a_long_corpus_is_counted_from_a_part(
    settings: Settings, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(settings())
    task = forecast.make_task(
        forecast.model_spec(config, lambda _: None)[0], inputs / "model" / "checkpoint-10", inputs
    )
    exact = count(config.corpus, task)
    assert exact.examples == ROWS
    monkeypatch.setattr("launch.probe.COUNTED", 15)
    part = count(config.corpus, task)
    assert part.examples == ROWS
    assert part.tokens == pytest.approx(exact.tokens, rel=0.3)


SOLVE = SolveTime(largest=3.0, scale=2.0, block=5.0, unit=4.0, rest=0.5)


def test_a_descent_passes_over_the_examples_for_every_block_of_queries() -> None:
    size = Size(rows=800, tokens=16_000, queries=40, checkpoints=1, shard_rows=100)  # twice the tokens a row
    inverse = Influence(query_block=16, max_iterations=39).inverse  # ten times the probe's products: 64 rows, 3 steps
    more = 800 / 64 * 2
    assert measured_solve(inverse, SOLVE, (80, 800), size, 1) == pytest.approx((3 + 5 * 10 * 3) * more + 2 + 0.5)
    assert measured_solve(inverse, SOLVE, (80, 800), size, 4) == pytest.approx((3 + 5 * 10 * 3) * more / 4 + 2 + 0.5)
    few = Influence(query_block=16, rows=160, max_iterations=3).inverse
    assert measured_solve(few, SOLVE, (80, 800), size, 1) == pytest.approx((3 + 5 * 3) * 160 / 64 * 2 + 2 + 0.5)


def test_repetitions_and_columns_do_not_grow_with_the_corpus() -> None:
    inverse = Influence(solver="lissa", depth=1000, repetitions=4).inverse
    alone = SolveTime(0.0, 0.0, 0.0, unit=4.0, rest=0.0)  # 50 iterations
    small, large = (Size(rows, 10 * rows, 32, 1, 100) for rows in (800, 80_000))
    assert measured_solve(inverse, alone, (80, 800), small, 1) == pytest.approx(4 * 20 * 4 * 2)
    assert measured_solve(inverse, alone, (80, 800), large, 3) == pytest.approx(4 * 20 * 3)
    columns = Influence(solver="sketch", depth=2000, columns=256).inverse
    assert measured_solve(columns, alone, (80, 800), large, 1) == pytest.approx(4 * 40 * 16)


def test_candidates_alone_are_scored() -> None:
    size = Size(rows=100_000, tokens=10**6, queries=10, checkpoints=1, shard_rows=1000)
    assert scored_share(FastIF(neighbours=900, recall_sample=100), size) == pytest.approx(0.1)
    assert scored_share(FastIF(neighbours=900, recall_sample=100, anchors=True), size) == pytest.approx(0.01)
    assert scored_share(Influence(), size) == 1.0
    stages = PROBE.stages | {"compute": StageTime(20.0, each=1.0, once=2.0, units=16), "features": StageTime(1.0)}
    probe = replace(PROBE, stages=stages, solve=SOLVE)
    near, every = (
        measured_seconds(probe, size, 1, 5, 1, method)["compute"]
        for method in (FastIF(neighbours=900, recall_sample=100), Influence())
    )
    assert near - 2 == pytest.approx((every - 2) / 10)


def test_solves_that_nobody_measured() -> None:
    size = Size(rows=1000, tokens=10_000, queries=10, checkpoints=1, shard_rows=100)
    one = 10 * 2 * 1e6 / 1e9  # seconds of a product of one example with one vector
    found = {
        name: assumed_solve(method, size, 1e6, 1e9, 64, 2)
        for name, method in {
            "cg": Influence(max_iterations=100), "lissa": Influence(solver="lissa", depth=50),
            "squared-cg": Influence(solver="squared-cg", max_iterations=100), "exact": Influence(solver="exact"),
            "sketch": Influence(solver="sketch", depth=10, columns=32), "projected": Influence(solver="projected"),
            "fastif": FastIF(depth=50), "tracin": TracIn(),
        }.items()
    }  # fmt: skip
    assert found["cg"]["solve, at most"] == pytest.approx((30 * 1000 + 100 * 10 * 1000) * one / 2)
    assert found["squared-cg"]["solve, at most"] == pytest.approx((30 * 1000 + 2 * 100 * 10 * 1000) * one / 2)
    assert found["exact"]["solve, at most"] == pytest.approx((30 * 1000 + 64 * 1000) * one / 2), (
        "a product for every weight"
    )
    assert found["lissa"]["solve"] == pytest.approx((30 * 1000 + 50 * 4 * 10) * one / 2)
    assert found["sketch"]["solve"] == pytest.approx((30 * 1000 + 2 * 10 * 32 * 32) * one / 2)
    assert found["projected"]["solve"] < 0.1
    assert found["fastif"] == found["lissa"] | {"features": pytest.approx(10_000 * 1e6 / 2 / 1e9 / 2)}
    assert found["tracin"] == {}


WHOLE = {"gradients": {"modules": ["classifier"], "projection": "none", "store": False}}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "influence", "tolerance": 0.1}, {"name": "influence", "solver": "lissa", "depth": 200},
        {"name": "fastif", "neighbours": 6, "recall_sample": 5, "depth": 200},
    ],
    ids=["cg", "lissa", "fastif"],
)  # fmt: skip
def test_a_solve_is_a_part_of_the_plan(settings: Settings, method: dict[str, Any]) -> None:
    made = plan(make_config(settings(**WHOLE, method=method)))
    here = made.times[0].seconds
    solve = "solve" if method.get("depth") else "solve, at most"
    assert here[solve] > 0
    score(make_config(settings(**WHOLE, method=method)), lambda _: None)  # what plan lets pass runs
    assert (here["features"] > 0) == (method["name"] == "fastif")
    assert made.probe is not None
    assert made.probe.solve is not None
    if method.get("depth"):
        assert here["solve"] >= 4 * 4 * made.probe.solve.unit, "four repetitions, four times as deep as the probe's"


def test_a_solve_that_the_driver_cannot_hold_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ["method.name=influence", "gradients.projection=none", "gradients.norms=false", "gradients.store=false"]
    with pytest.raises(
        ValueError, match=r"solving for 1000 queries, 16 at a time, over .* weights needs .* GiB on the"
    ):
        plan(load_config(str(BILLION), whole))
    top = plan(load_config(str(BILLION), [*whole, "gradients.modules=null", "plan.queries=1", "method.query_block=1"]))
    assert top.times[0].seconds["solve, at most"] > 0
    monkeypatch.setattr("actors.solve.psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(ValueError, match="on the driver, of which 0.00 GiB are free: choose fewer gradients.modules"):
        forecast.refuse_unfit(Influence().inverse, {"w": 1000}, 3)


def test_a_hessian_that_is_indefinite_on_few_examples_is_planned() -> None:
    """The probe's own λ is large: what it times does not depend on it, and whether the job's is enough the job will say."""
    given = Influence(curvature="hessian", damping_absolute=0.01, max_iterations=50)
    assert probe_settings(given) == {
        "damping": 10.0, "damping_absolute": None, "rows": 64, "max_iterations": 3, "tolerance": 1e-12
    }  # fmt: skip
    scaled = probe_settings(Influence(solver="lissa", lissa_scale=1.0, depth=10, rows=20))
    assert scaled == {
        "repetitions": 1,
        "depth": 10,
        "damping": 10.0,
        "damping_absolute": None,
        "lissa_scale": None,
        "rows": 20,
    }
    assert probe_settings(Influence(solver="projected")) == probe_settings(TracIn()) == {}
