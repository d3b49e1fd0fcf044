"""Minima: of a ridge regression to its closed form, with flat directions, and what is said where there is none."""

import pytest
import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.minimum import MeanLoss, minimise, settle


def batches(count: int = 60, classes: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, generator=generator).double()
    y = torch.randint(0, classes, (count,), generator=generator)
    whole = Batch(torch.arange(count), {"x": x, "y": y})
    return [whole.take(list(range(0, 40))), whole.take(list(range(40, count)))]


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"])[:, 0] - batch["y"].double()).square() / 2


def softmax(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def double_well(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"].abs())[:, 0].square() - 1).square()


def linear(outputs: int = 1, bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(3, outputs, bias=bias).double()


def test_a_ridge_regression_ends_at_its_closed_form() -> None:
    objective = MeanLoss(linear(bias=False), squares, batches(), 0.1)
    x = torch.cat([batch["x"] for batch in objective.batches])
    y = torch.cat([batch["y"] for batch in objective.batches]).double()
    truth = torch.linalg.solve(x.T @ x / 60 + 0.1 * torch.eye(3).double(), x.T @ y / 60)
    lengths: list[float] = []
    found, hessian = settle(objective, objective.weights, 10, 3, 1e-12, lengths.append)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-11)
    torch.testing.assert_close(hessian, x.T @ x / 60 + 0.1 * torch.eye(3).double())
    assert lengths[-1] <= 1e-12


def test_logits_that_may_all_rise_are_a_minimum_without_l2() -> None:
    objective = MeanLoss(linear(3), softmax, batches(), 0.0)
    found = minimise(objective, objective.weights, 100, 3, 1e-9)
    assert float(objective.slope(found)[1].norm()) <= 1e-9


def test_a_saddle_is_said_to_be_one() -> None:
    objective = MeanLoss(linear(bias=False), double_well, batches(), 0.0)
    with pytest.raises(FloatingPointError, match=r"the gradient is 0 long, but the Hessian has an eigenvalue of -"):
        minimise(objective, torch.zeros(3).double(), 1, 0, 1e-9)


def test_what_is_left_is_what_the_last_round_left() -> None:
    objective = MeanLoss(linear(3), softmax, batches(), 1e-3)
    lengths: list[float] = []
    with pytest.raises(FloatingPointError) as error:
        minimise(objective, objective.weights, 1, 1, 1e-30, lengths.append)
    assert len(lengths) == 2
    assert lengths[1] < lengths[0]
    assert f"a gradient of length {lengths[1]:.2g} is left" in str(error.value)


def test_more_weights_than_a_matrix_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.minimum.MAX_EXACT", 2)
    monkeypatch.setattr(MeanLoss, "hessian", None)
    objective = MeanLoss(linear(3), softmax, batches(), 0.1)
    found = minimise(objective, objective.weights, 100, 3, 1e-9)
    assert float(objective.slope(found)[1].norm()) <= 1e-9


def test_a_hessian_is_made_where_the_model_is() -> None:
    """On torch's device without numbers: whatever is made on the CPU meets it there and fails."""
    there = [Batch(b.ids, {name: t.to("meta") for name, t in b.tensors.items()}) for b in batches()]
    objective = MeanLoss(linear().to("meta"), squares, there, 0.1)
    seen: list[torch.device] = []

    def total(self: object, given: object, block: Tensor) -> Tensor:
        seen.append(block.device)
        return torch.zeros_like(block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.minimum.Curvature.total", total)
        assert objective.hessian(objective.weights).device.type == "meta"
    assert {device.type for device in seen} == {"meta"}
