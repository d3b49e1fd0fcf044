"""Influence scores of the whole job against whole matrices made entry by entry, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors import block_solver, operator, solve, solver_states, worker
from actors.solve import refuse_unfit
from engine import influence
from engine.methods.contract import load_method
from engine.methods.inverse import InverseCurvature
from engine.stochastic_solvers import Lissa, lissa_batches
from launch.config import make_config
from launch.influence import check_rows
from launch.run import Run
from tests.end_to_end.answers import Matrices, dense, digests, matrices, self_influence
from tests.end_to_end.conftest import Settings, Told, run_job
from tests.end_to_end.test_same_result import Killed, kill_in

HEAD = ["classifier.weight", "classifier.bias"]
UPPER = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", *HEAD]
WHOLE = {"modules": ["bert.pooler", "classifier"], "projection": "none", "store": False}
ARTEFACTS = ("states", "scores", "index")
METHOD = {"name": "influence", "dtype": "float64", "tolerance": 1e-7, "query_block": 3}


def influence_job(settings: Settings, method: dict[str, Any] | None = None, **sections: Any) -> Run:
    return run_job(settings(**{"gradients": WHOLE, "method": METHOD | (method or {})} | sections))


def figures(run: Run) -> dict[str, Any]:
    return run.index().meta["solve"]


@pytest.fixture(scope="module")
def made() -> dict[str, Matrices]:
    return {}


@pytest.fixture
def whole(made: dict[str, Matrices]) -> Callable[[Run, str], Matrices]:
    """Return the matrices of the tiny job, made once: every run here has the same model and examples."""

    def get(run: Run, kind: str = "gauss-newton") -> Matrices:
        if kind not in made:
            made[kind] = matrices(run, UPPER, kind)
        return made[kind]

    return get


FILTERS: dict[str, Callable[[float], Callable]] = {
    "cg": lambda damping: lambda mu: 1 / (mu + damping),
    "exact": lambda damping: lambda mu: 1 / (mu + damping),
    "squared-cg": lambda damping: lambda mu: mu / (mu.square() + damping),
}


def near(run: Run, found: Matrices, solver: str) -> bool:
    damping = run.index().meta["damping"]
    least = damping if solver != "squared-cg" else 2 * damping**0.5
    return bool((np.abs(dense(run) - found.scores(FILTERS[solver](damping))) <= 1e-5 * found.bound(least)).all())


@pytest.mark.parametrize("solver", FILTERS)
def test_every_solver_equals_the_filter_of_its_matrix(settings: Settings, whole: Callable, solver: str) -> None:
    slow = {"query_block": 5} if solver == "squared-cg" else {}  # most of whose time are products, block by block
    run = influence_job(settings, {"solver": solver} | slow)
    found = whole(run, "hessian" if solver == "squared-cg" else "gauss-newton")
    assert near(run, found, solver)
    mu = torch.linalg.eigvalsh(found.curvature.mean(0)).abs().max()
    relative = 1e-4 * mu**2 if solver == "squared-cg" else 0.01 * mu
    assert run.index().meta["damping"] == pytest.approx(float(relative), rel=0.02)
    said = figures(run)
    assert all(said["converged"])
    assert len(said["residual"]) == len(said["iterations"]) == len(said["identity"]) == 5
    assert max(said["residual"]) < 2e-7
    assert said["examples"] == 45
    assert run.index().meta["score_unit"] == "per_example_loo"
    assert np.isnan(self_influence(run)).all()


def test_lissa_equals_its_recursion_on_matrices(settings: Settings, whole: Callable) -> None:
    method = {"solver": "lissa", "depth": 20, "batch_size": 3, "repetitions": 2, "damping": 0.2}
    run = influence_job(settings, method)
    found, said = whole(run), figures(run)
    lissa = Lissa(said["damping"], said["scale"], 20, 3, 2)
    ids, b, estimates = torch.arange(45), found.asked.T, []
    for repetition in range(2):
        x = b
        for batch in lissa_batches(ids, lissa, repetition):
            x = b + (1 - lissa.damping / lissa.scale) * x - found.curvature[batch].mean(0) @ x / lissa.scale
        estimates.append(x / lissa.scale)
    truth = (found.train @ torch.stack(estimates).mean(0) / 45).numpy()
    assert (np.abs(dense(run) - truth) <= 1e-5 * found.bound(lissa.damping)).all()
    assert len(said["standard_error"]) == 5
    assert not run.location.list("states/scores/lissa")


def test_stored_whole_rows_score_alike(settings: Settings, whole: Callable) -> None:
    stored = {"store": True, "dtype": "float32", "projection": "none", "modules": WHOLE["modules"]}
    run = influence_job(settings, gradients=stored)
    assert near(run, whole(run), "cg")


def test_l2_and_fewer_rows_change_the_curvature(settings: Settings, whole: Callable) -> None:
    run = influence_job(settings, {"l2": 0.3})
    found, damping = whole(run), run.index().meta["damping"]
    truth = found.scores(lambda mu: 1 / (mu + 0.3 + damping))
    assert (np.abs(dense(run) - truth) <= 1e-5 * found.bound(damping + 0.3)).all()
    some = influence_job(settings, {"rows": 20}, run=run.location.uri + "-some")
    ids = block_solver.sampled_ids(some.corpus(some.index()), 20, 0)
    assert len(set(ids)) == 20
    part = Matrices(found.curvature[torch.from_numpy(ids)], found.train, found.asked)
    assert near(some, part, "cg")
    assert figures(some)["examples"] == 20


def test_projected_solve_is_the_inverse_on_stored_rows_and_online(settings: Settings, whole: Callable) -> None:
    stored = {"modules": WHOLE["modules"], "projection": "none", "dtype": "float32"}
    run = influence_job(settings, {"solver": "projected"}, gradients=stored)
    g = whole(run).train
    empirical = Matrices(g[:, :, None] * g[:, None, :], g, whole(run).asked)
    damping = run.index().meta["damping"]
    assert damping == pytest.approx(0.1 * float(empirical.curvature.mean(0).trace()) / g.shape[1], rel=1e-4)
    assert near(run, empirical, "cg")
    record = run.queries(run.index()).row(1)
    again = run.score([record["text"]], [record["label"]], k=3)[0].proponents
    kept = run.top(1, k=3).to_pylist()[:3]
    assert [row["id"] for row in again] == [row["id"] for row in kept]
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in kept], rel=1e-5)


def test_a_damping_may_be_absolute(settings: Settings, whole: Callable) -> None:
    run = influence_job(settings, {"damping_absolute": 0.05})
    assert run.index().meta["damping"] == 0.05
    assert figures(run)["largest"] > 0
    assert near(run, whole(run), "cg")
    for solver in ("cg", "squared-cg", "lissa", "sketch", "projected"):
        assert InverseCurvature(solver, "hessian", None, damping_absolute=50.0).absolute(3.0) == 50.0
    given = {solver: InverseCurvature(solver, "hessian", 0.5).absolute(3.0) for solver in ("lissa", "sketch")}
    assert given == {"lissa": 1.5, "sketch": 4.5}, "relative to λ_max, or to its square"


def test_one_query_is_scored_by_directional_derivatives(settings: Settings, whole: Callable) -> None:
    one = settings()["queries"] | {"limit": 1}
    run = influence_job(settings, queries=one)
    damping, found = run.index().meta["damping"], whole(run)
    truth = found.scores(FILTERS["cg"](damping))[:, :1]
    assert (np.abs(dense(run) - truth) <= 1e-5 * found.bound(damping)[:, :1]).all()


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "sign": (influence, "per_example_loo", lambda products, count: -products / count),
    "no 1/n": (influence, "per_example_loo", lambda products, count: products),
    "first block only": (operator.TreeSum, "add", lambda self, place, part: self._parts.setdefault((0, 0), part)),
    "gradients unsolved": (block_solver, "start", None),
}


def unsolved(inverse: Any, solver_operator: Any, b: torch.Tensor, largest: float, state: Any) -> Any:
    found = yield from START(inverse, solver_operator, b, largest, state)
    return block_solver.Solution(
        b, found.residual, found.converged, 1, found.damping, found.largest, found.identity, found.standard_error
    )


START = block_solver.start


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(settings: Settings, whole: Callable, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, wrong or unsolved)
    if owner is influence:
        monkeypatch.setattr(solve, name, wrong)
    run = influence_job(settings)
    assert not near(run, whole(run), "cg")


@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_the_number_of_workers_changes_no_bit(settings: Settings, tmp_path: Path, solver: str) -> None:
    method = {"solver": solver, "depth": 10, "tolerance": 1e-4}
    left = []
    for workers in (1, 2, 3):
        cluster = {"workers": workers}
        left.append(influence_job(settings, method, run=str(tmp_path / f"run-{workers}"), cluster=cluster))
    one, *others = [digests(run, *ARTEFACTS) for run in left]
    assert all(other == one for other in others)


@pytest.mark.parametrize(
    ("solver", "function", "call"),
    [("cg", "curvature", 5), ("cg", "curvature", 40), ("exact", "curvature", 20), ("squared-cg", "curvature", 40),
     ("lissa", "lissa", 3), ("cg", "compute", 2)],
)  # fmt: skip
def test_a_killed_job_resumes_to_the_same_bits(
    settings: Settings, tmp_path: Path, solver: str, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHOD | {"solver": solver, "depth": 6, "tolerance": 1e-2}
    small = {"gradients": WHOLE | {"modules": ["classifier"]}, "method": method}
    monkeypatch.setattr(solver_states, "SECONDS", 0.0)  # every state is saved
    products = count(monkeypatch)
    undisturbed = run_job(settings(run=str(tmp_path / "whole"), **small))
    all_products = len(products)
    with monkeypatch.context() as patch:
        kill_in(function, call, patch)
        with pytest.raises(Killed):
            run_job(settings(**small))
    saved = sorted((tmp_path / "run/journal").glob("solve-scores/solver.*"))
    if function == "curvature":
        assert len(saved) in (1, 2)
    products.clear()
    again = run_job(settings(**small))
    assert digests(undisturbed, *ARTEFACTS) == digests(again, *ARTEFACTS)
    if function == "curvature":
        assert len(products) <= all_products - call + 3  # what was done of the product at work is done again
    assert not again.location.list("states/scores/solved")
    assert not [key for key in again.location.list("journal/solve-scores") if "/solver." in key]


@pytest.mark.parametrize("solver", ["lissa", "sketch"])
def test_a_unit_that_takes_long_works_in_turns(
    settings: Settings, tmp_path: Path, solver: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A turn is one iteration here. A job killed between two of them does none again, and leaves the same bits."""
    own = {"lissa": {"repetitions": 2}, "sketch": {"columns": 2}}
    method = METHOD | {"solver": solver, "depth": 4, "query_block": 16} | own[solver]
    small = {"gradients": WHOLE | {"modules": ["classifier"]}, "method": method}
    monkeypatch.setattr(block_solver, "batch_scale", lambda *_: 50.0)  # measured, it takes most of the test
    undisturbed = run_job(settings(run=str(tmp_path / "whole"), **small))
    monkeypatch.setattr(solver_states, "TURN", 0.0)
    turns = count(monkeypatch, solver)
    in_turns = run_job(settings(run=str(tmp_path / "turns"), **small))
    units = 2 if solver == "lissa" else 1
    assert len(turns) == units * (4 + 1), "one a turn, and a last one that finds nothing left to do"
    assert f"unit {turns[0]}: 3 of 4 iterations" in capfd.readouterr().err
    turns.clear()
    with monkeypatch.context() as patch:
        kill_in(solver, 3, patch)
        with pytest.raises(Killed):
            run_job(settings(**small))
    assert [key for key in run_files(tmp_path / "run") if "/unfinished/" in key]
    again = run_job(settings(**small))
    assert len(turns) == units * (4 + 1)
    assert digests(undisturbed, *ARTEFACTS) == digests(in_turns, *ARTEFACTS) == digests(again, *ARTEFACTS)


def run_files(run: Path) -> list[str]:
    return [str(path) for path in run.rglob("*") if path.is_file()]


def count(monkeypatch: pytest.MonkeyPatch, function: str = "curvature") -> list[str]:
    """Note every unit of this function from now on."""
    seen: list[str] = []
    whole = worker.UNIT_FUNCTIONS[function]

    def counting(context: Any, settings: Any, unit: Any) -> Any:
        seen.append(unit.key)
        return whole(context, settings, unit)

    monkeypatch.setitem(worker.UNIT_FUNCTIONS, function, counting)
    return seen


def test_settings_of_another_solver_are_said_to_have_no_effect(settings: Settings) -> None:
    def said(method: dict[str, Any]) -> list[str]:
        config, told = make_config(settings(gradients=WHOLE, method={"name": "influence"} | method)), list[str]()
        check_rows(load_method(config.method.name, config.method.settings()), config, told.append)
        return told

    assert said({"depth": 5, "lissa_scale": 2.0, "tolerance": 0.1}) == [
        "warning: method.depth, method.lissa_scale: without effect on method.solver=cg"
    ]
    assert said({"solver": "sketch", "columns": 4, "repetitions": 2}) == [
        "warning: method.repetitions: without effect on method.solver=sketch"
    ]
    assert said({"solver": "lissa", "depth": 5, "lissa_scale": 2.0, "batch_size": 2, "repetitions": 1}) == []


def test_running_again_solves_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(influence_job(settings), *ARTEFACTS)
    for function in list(worker.UNIT_FUNCTIONS):
        monkeypatch.setitem(worker.UNIT_FUNCTIONS, function, None)
    assert digests(influence_job(settings), *ARTEFACTS) == before


@pytest.mark.parametrize(
    ("method", "gradients", "said"),
    [
        ({"damping": -0.1}, {}, "method.damping=-0.1 is not allowed: must be a number above 0"),
        ({"solver": "newton"}, {}, "method.solver='newton' is not allowed: must be 'cg', 'squared-cg', "),
        ({"damping": 0.1, "damping_absolute": 50.0}, {}, "method.damping=0.1 and method.damping_absolute=50.0 are not"),
        ({"rows": 0}, {}, "method.rows=0 is not allowed: must be a whole number of at least 1"),
        ({"dampening": 0.1}, {}, "method.dampening is not known. Did you mean method.damping?"),
        ({}, {"projection": "two-sided"}, "Set gradients.projection=none and gradients.store=false, or method.solver="),
        ({"solver": "projected"}, {}, "method.solver=projected solves on stored rows: set gradients.store=true"),
        ({"tolerance": 1.0}, {}, "method.tolerance=1.0 is not allowed"),
        ({"solver": "lissa", "lissa_scale": 1e-6}, {}, "LiSSA with scale=1e-06 diverges"),
    ],
)
def test_bad_settings_are_refused(settings: Settings, told: Told, method: dict, gradients: dict, said: str) -> None:
    assert said in told(settings(gradients=WHOLE | gradients, method=METHOD | method))


def test_what_does_not_fit_is_refused_with_the_ways_out() -> None:
    inverse = InverseCurvature("cg", "gauss-newton", None)
    with pytest.raises(ValueError, match="fewer gradients.modules.*smaller method.query_block.*projected") as error:
        refuse_unfit(inverse, {"w": 10**6}, 100, free=10**9)
    assert "0.7" in str(error.value) or "1." in str(error.value)
    refuse_unfit(inverse, {"w": 10**6}, 100, free=2 * 10**9)
    with pytest.raises(ValueError, match="at most 16384"):
        refuse_unfit(InverseCurvature("exact", "gauss-newton", None), {"w": 20_000}, 1)
    with pytest.raises(ValueError, match="needs 6.00 GiB"):
        refuse_unfit(InverseCurvature("exact", "gauss-newton", None), {"w": 2**14}, 1, free=10**8)
    with pytest.raises(ValueError, match="on the driver"):
        refuse_unfit(InverseCurvature("lissa", "gauss-newton", None), {"w": 10**6}, 16, free=9 * 10**8)


def test_a_curvature_that_changes_little_is_said(settings: Settings) -> None:
    said: list[str] = []
    from launch.config import make_config
    from launch.job import score

    score(make_config(settings(gradients=WHOLE, method=METHOD | {"damping": 100.0})), said.append)
    assert any("the curvature changed little" in line for line in said)
