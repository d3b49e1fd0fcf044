import numpy as np
import pytest
import torch

from actors.collect import receipt_of, shard_gradients
from actors.specs import GradientSpec
from actors.units import Unit
from engine.batches import Batch
from engine.gradients import PerExampleGradients
from engine.parameters import supported_parameters
from engine.projection import Projection
from engine.projectors import Whole
from storage.gradients import DONE, QUARANTINED
from tests.conftest import ToyMlp, mlp_batch, mlp_loss, randomise

SPEC = GradientSpec(("head.weight", "head.bias"), Projection("none"), True, 4)


class ToyTask:
    """Rows of numbers; row 103 has a loss that is not finite, row 104 a gradient."""

    broken = True

    def collate(self, rows: list[dict]) -> Batch:
        batch = mlp_batch()
        at = [row["id"] - 100 for row in rows]
        return Batch(batch.ids[at], {name: tensor[at] for name, tensor in batch.tensors.items()})

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        losses = mlp_loss(model, batch)
        if not self.broken:
            return losses
        losses = torch.where(batch.ids == 103, torch.inf, losses)
        zero = torch.where(batch.ids == 104, losses - losses.detach(), 1.0)  # its root has an infinite slope
        return torch.where(batch.ids == 104, zero.sqrt(), losses)


def shard(task: ToyTask, lengths: tuple[int, ...] = (3, 1, 2, 2, 1, 3)):
    model = randomise(ToyMlp()).double()
    named = {p.name: p for p in supported_parameters(model)[0]}
    parameters = [named[name] for name in SPEC.parameters]
    rows = [{"id": 100 + i, "length": length} for i, length in enumerate(lengths)]
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        return shard_gradients(hooks, task, rows, SPEC, torch.device("cpu"))


def test_rows_stand_in_the_order_of_the_shard_whatever_the_batches() -> None:
    task = ToyTask()
    task.broken = False
    (by_length, none), (one_by_one, _) = shard(task), shard(task, (9,) * 6)
    assert not none
    for name, array in by_length.rows.items():
        assert np.allclose(array, one_by_one.rows[name], rtol=1e-6)
    assert np.allclose(by_length.losses, one_by_one.losses)
    assert (by_length.state == DONE).all()


def test_a_row_that_is_not_finite_is_nan_throughout_and_named() -> None:
    block, bad = shard(ToyTask())
    assert bad == {3: "the loss", 4: "the gradient of head.weight"}
    assert block.state.tolist() == [DONE] * 3 + [QUARANTINED] * 2 + [DONE]
    assert block.norms is not None
    for array in (*block.rows.values(), block.norms, block.losses[:, None]):
        assert np.isnan(array[3:5]).all()
        assert np.isfinite(array[[0, 1, 2, 5]]).all()


@pytest.mark.parametrize(("payload", "under"), [({"checkpoint": "c-1"}, " under c-1"), ({}, "")])
def test_a_receipt_names_ids_places_and_the_checkpoint(payload: dict[str, str], under: str) -> None:
    receipt = receipt_of(Unit("u", payload), np.arange(100, 103), 6, {2: "the loss"}, [])
    assert receipt.quarantined == {102: f"the loss{under}"}
    assert (receipt.rows, receipt.tokens) == (3, 6)
