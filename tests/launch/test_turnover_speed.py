"""turnover.speed's figures: what is compared with what, and that its passes do the work they are said to do."""

import numpy as np
import pytest
import torch

from engine.solvers import finish, relative
from engine.stochastic_solvers import Lissa, lissa_repetition
from launch import validate
from launch.experiments.turnover_speed import (
    EXPERIMENT,
    Work,
    make_work,
    of_one_length,
    overtakes,
    ratios,
    residuals,
)

CONFIG = validate.experiment_config("turnover.speed", toy=True)
SECONDS = {
    "turn-over": 10.0, "two forwards": 28.0, "solve": 15.0, "derivatives": 20.0, "paper's solve": 90.0,
    "paper's gradients": 80.0, "many: solve": 33.0, "many: products": 30.0,
}  # fmt: skip


def seconds(**changed: float) -> dict[str, np.ndarray]:
    return {label: np.full(3, value) for label, value in (SECONDS | changed).items()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return make_work(CONFIG, "top", tmp_path_factory.mktemp("work"))


def test_influence_is_its_solve_and_its_derivatives_as_a_multiple_of_turn_over() -> None:
    found = {gate.name: gate for gate in ratios("masks", "top", seconds())}
    influence = found["masks: influence / turn-over dropout"]
    assert (influence.value, influence.threshold, influence.record()["pass"]) == (3.5, 3.0, True)
    assert found["masks: the paper's arm / turn-over dropout"].value == 17.0
    shared = found["masks: two full forwards / shared prefix"]
    assert (shared.value, shared.threshold) == (2.8, 2.5)
    slower = ratios("masks", "top", seconds(solve=5.0))
    assert slower[0].record()["pass"] is False
    assert ratios("masks", "all", seconds())[2].threshold is None


def test_influence_takes_less_from_the_query_where_both_lines_meet() -> None:
    """One query costs 35 s, eight cost 63 s: 4 s each and 31 s once; turn-over costs 10 s each."""
    assert overtakes("masks", 8, seconds()).value == pytest.approx(31 / 6)
    assert overtakes("masks", 8, seconds(**{"turn-over": 3.0})).value == 0.0


def test_queries_are_those_nearest_to_the_median_length() -> None:
    rows = [{"input_ids": [0] * length} for length in (3, 50, 9, 11, 10, 2)]
    assert [len(row["input_ids"]) for row in of_one_length(rows, 3)] == [9, 10, 11]


def test_adapters_of_the_top_third_and_the_head_are_compared(work: Work) -> None:
    names = {weight.name for weight in work.space.weights}
    assert {"classifier.weight", "classifier.bias"} < names
    assert all(".layer.1." in name and ".adapter." in name for name in names if not name.startswith("classifier"))
    assert all(not weight.requires_grad for weight in work.model.parameters())
    assert work.turnover.before == ["classifier"]


def test_the_residual_is_that_of_the_whole_system(work: Work) -> None:
    lissa = Lissa(0.5, 4.0, 30, 12, 1)
    matrix = work.operator(len(work.train)).apply(torch.eye(work.space.size, dtype=torch.float64))
    b = torch.cat([work.gradient(work.query(number)) for number in range(2)], 1)
    exact = torch.linalg.solve(matrix + 0.5 * torch.eye(len(b), dtype=torch.float64), b)
    assert float(relative(b - matrix @ exact - 0.5 * exact, b).max()) < 1e-10
    x = finish(lissa_repetition(work.operator(1), b, torch.arange(len(work.train)), lissa, 0, 0.1))
    few, many = (residuals(work, Lissa(0.5, 4.0, steps, 12, 1), 0.1, 2) for steps in (lissa.iterations, 90))
    assert few == pytest.approx(relative(b - matrix @ x - 0.5 * x, b).tolist(), rel=2e-3)
    assert all(0 < later < sooner < 1 for sooner, later in zip(few, many, strict=True))


def test_more_ids_are_asked_of_the_second_memory_cell() -> None:
    full = validate.experiment_config("turnover.speed", toy=False)
    assert full["memory_ids"]["many"] == 1_000_000
    assert set(EXPERIMENT.cells(full)) == {"all", "top", "memory-few", "memory-many"}
