"""What every operator must do, whichever it is: a solver cannot tell which one it holds."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.curvature import curvature_unit
from actors.held_curvature import HeldCurvature
from actors.operator import DistributedOperator
from actors.pool import InProcessPool
from actors.units import Receipt, Unit
from engine.batches import Batch
from engine.coordinates import Coordinates, chosen_coordinates
from engine.curvature import Curvature, LocalOperator, Operator
from engine.solvers import conjugate_gradient, exact, finish, largest_eigenvalue
from tests import oracles
from tests.conftest import mlp_batch, mlp_loss, randomise, text_loss, tiny_bert, token_batch
from tests.engine.test_curvature import SmoothMlp, cut
from tests.oracles import MatrixOperator


def on_matrices() -> tuple[Operator, Tensor]:
    factors = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    return MatrixOperator(factors @ factors.transpose(1, 2)), torch.arange(5)


def on_a_model(cache_bytes: int = 0) -> tuple[Operator, Tensor]:
    model, batch = tiny_bert().double(), token_batch()
    chosen = chosen_coordinates(model, ["bert.pooler", "classifier"])
    curvature = Curvature(model, text_loss, chosen, dtype=torch.float64)
    return LocalOperator(curvature, cut(batch, 3), 0.01, cache_bytes), batch.ids


def on_a_hessian() -> tuple[Operator, Tensor]:
    model, batch = randomise(SmoothMlp()).double(), mlp_batch()
    curvature = Curvature(model, mlp_loss, chosen_coordinates(model, ["*"]), "hessian", torch.float64)
    return LocalOperator(curvature, cut(batch, 4), l2=0.5), batch.ids


def distributed() -> tuple[Operator, Tensor]:
    """Return the operator of a pool whose three workers hold the same model and examples as the local one."""
    model, batch = tiny_bert().double(), token_batch()
    chosen = chosen_coordinates(model, ["bert.pooler", "classifier"])
    pool = InProcessPool(lambda: CurvatureWorker(model, chosen, batch), 3)
    ids = batch.ids.numpy()
    return DistributedOperator(pool, {}, chosen.size, ids, block_rows=2, l2=0.01), batch.ids


class CurvatureWorker:
    """Carries out units of curvature on a model that it is given."""

    def __init__(self, model: nn.Module, chosen: Coordinates, batch: Batch) -> None:
        places = {int(example): place for place, example in enumerate(batch.ids)}
        curvature = Curvature(model, text_loss, chosen, dtype=torch.float64)
        task = SimpleNamespace(collate=lambda rows: batch.take([row["place"] for row in rows]))

        def read(ids: np.ndarray) -> list[dict]:
            return [{"place": places[int(i)], "length": 7} for i in ids]

        self._held = HeldCurvature(curvature, task, read, 14, torch.device("cpu"))
        self._context = SimpleNamespace(curvature=lambda *settings: self._held)

    def run(self, function: str, settings: dict[str, Any], unit: Unit) -> Receipt:
        empty = {"model": None, "gradients": None, "curvature": None}
        return curvature_unit(self._context, empty | settings, unit)  # type: ignore[arg-type]


OPERATORS = {
    "distributed": distributed,
    "matrices": on_matrices, "local": on_a_model, "replayed": lambda: on_a_model(1 << 20), "hessian": on_a_hessian,
}  # fmt: skip


@pytest.fixture(params=list(OPERATORS))
def held(request: pytest.FixtureRequest) -> tuple[Operator, Tensor]:
    return OPERATORS[request.param]()


def block(operator: Operator, k: int, seed: int = 0) -> Tensor:
    return torch.randn(operator.size, k, generator=torch.Generator().manual_seed(seed)).double()


def test_symmetric_linear_float64_and_the_same_each_time(held: tuple[Operator, Tensor]) -> None:
    operator, ids = held
    for chosen in (None, ids[:2]):
        u, v = block(operator, 2, 1), block(operator, 2, 2)
        hu, hv = operator.apply(u, chosen), operator.apply(v, chosen)
        assert hu.dtype == torch.float64
        assert hu.shape == u.shape
        assert torch.equal(operator.apply(u, chosen), hu)
        assert float((u.T @ hv - hu.T @ v).abs().max()) < 1e-10 * float(u.norm() * hv.norm())
        assert oracles.relative_error(operator.apply(u - 2 * v, chosen), hu - 2 * hv) < 1e-10


def test_all_ids_are_the_whole_and_the_mean_is_over_those_given(held: tuple[Operator, Tensor]) -> None:
    operator, ids = held
    v = block(operator, 1)
    assert oracles.relative_error(operator.apply(v, ids), operator.apply(v)) < 1e-10
    each = torch.stack([operator.apply(v, i[None]) for i in ids])
    assert oracles.relative_error(operator.apply(v), each.mean(0)) < 1e-10
    assert oracles.relative_error(operator.apply(v, ids[[0, 0, 1]]), (2 * each[0] + each[1]) / 3) < 1e-10


def test_solvers_agree_on_it(held: tuple[Operator, Tensor]) -> None:
    operator, _ = held
    b = block(operator, 2)
    largest = finish(largest_eigenvalue(operator))
    damping = 0.2 * largest
    found = finish(conjugate_gradient(operator, b, damping, largest, 1e-11))
    truth = finish(exact(operator, b, damping))
    assert oracles.relative_error(found.x, truth.x) < 1e-9
    assert 0.9 * truth.largest < largest <= truth.largest * (1 + 1e-12)
