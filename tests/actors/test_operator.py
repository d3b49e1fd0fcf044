"""Products over a pool: the local operator's bits, whatever the workers, their order and their losses."""

from typing import Any

import pytest
import torch

from actors import operator
from actors.operator import DistributedOperator, TreeSum
from actors.pool import InProcessPool
from actors.units import Receipt, Unit
from engine.coordinates import chosen_coordinates
from engine.curvature import Curvature, LocalOperator, tree_sum
from tests.conftest import text_loss, tiny_bert, token_batch
from tests.contracts.test_operators import CurvatureWorker
from tests.engine.test_curvature import cut

LENGTHS = (3, 7, 2, 5, 4, 6, 1)


class Leaving(CurvatureWorker):
    """A worker that ends once, in the middle of a product."""

    left = 1

    def run(self, function: str, settings: dict[str, Any], unit: Unit) -> Receipt:
        if unit.key.endswith("2") and Leaving.left:
            Leaving.left -= 1
            raise SystemExit(9)
        return super().run(function, settings, unit)


def product(workers: int, block_rows: int = 1, kind: type[CurvatureWorker] = CurvatureWorker) -> torch.Tensor:
    model, batch = tiny_bert(), token_batch(LENGTHS)
    chosen = chosen_coordinates(model, ["bert.pooler", "classifier"])
    pool = InProcessPool(lambda: kind(model, chosen, batch), workers)
    made = DistributedOperator(pool, {}, chosen.size, batch.ids.numpy(), block_rows)
    block = torch.randn(chosen.size, 2, generator=torch.Generator().manual_seed(0)).double()
    return made.apply(block)


def test_the_bits_are_those_of_the_local_operator_and_of_any_number_of_workers() -> None:
    model, batch = tiny_bert().double(), token_batch(LENGTHS)
    chosen = chosen_coordinates(model, ["bert.pooler", "classifier"])
    block = torch.randn(chosen.size, 2, generator=torch.Generator().manual_seed(0)).double()
    local = LocalOperator(Curvature(model, text_loss, chosen, dtype=torch.float64), cut(batch, len(LENGTHS)))
    one = product(1)
    assert torch.equal(one, local.apply(block))
    assert torch.equal(product(2), one)
    assert torch.equal(product(3), one)


def test_a_worker_lost_in_the_middle_changes_no_bit() -> None:
    Leaving.left = 1
    assert torch.equal(product(2, kind=Leaving), product(1))
    assert Leaving.left == 0


@pytest.mark.parametrize("count", range(1, 12))
def test_partials_are_added_in_the_tree_of_their_numbers(count: int) -> None:
    parts = [torch.randn(3, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in range(count)]
    for seed in range(5):
        tree = TreeSum()
        for place in torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist():
            tree.add(place, parts[place])
        assert torch.equal(tree.total(), tree_sum(parts))


def test_the_order_of_arrival_is_a_mutation(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.tensor(x) for x in (1e8, 1.0, -1e8, 1.0)]
    arrived, exact = TreeSum(), tree_sum(parts)
    monkeypatch.setattr(operator.TreeSum, "add", lambda self, place, part: self._parts.update(
        {(0, 0): self._parts.get((0, 0), torch.zeros(())) + part}))  # fmt: skip
    for place in (0, 2, 1, 3):
        arrived.add(place, parts[place])
    assert not torch.equal(arrived.total(), exact)
