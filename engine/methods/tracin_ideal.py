"""What every single step of training did to each query's loss: TracInIdeal (Pruthi et al. 2020, section 3.1).

    TracInIdeal(z, z′) = Σ over the steps t that visited z of  ℓ(w_t, z′) − ℓ(w_{t+1}, z′)

and beside it the first-order term η ∇ℓ(w_t, z)·∇ℓ(w_t, z′) that TracIn puts in its place. Both need the training run
itself, every step of it: for small models, and to judge what a few checkpoints are worth.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine.batches import Batch
from engine.forward_mode import LossModule, Named, along
from engine.training import TrainSettings, train


@dataclass(frozen=True)
class StepEffect:
    """What one step did to the Q queries; both positive where it lowered the loss."""

    fall: Tensor  # [Q] ℓ(w_t, z′) − ℓ(w_{t+1}, z′); the falls of all steps add up to ℓ(w_0, z′) − ℓ(w_T, z′)
    first_order: Tensor  # [Q] (w_t − w_{t+1})·∇ℓ(w_t, z′): under SGD η g·∇ℓ(w_t, z′), g the mean gradient of the batch.
    # Statistics of a batch norm are part of the state that `fall` compares; first order follows the weights alone.


def every_step(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    collate: Callable[[list[Any]], Batch],
    rows: list[Any],
    queries: Batch,
    settings: TrainSettings,
) -> Iterator[StepEffect]:
    """Train in place and yield the effect of every step, measured in evaluation mode.

    Small steps need a float64 model: the fall is a difference of two losses. Cost a step: a training step and about four
    forward passes of the queries, one of them with a directional derivative (no fused attention). Raises ValueError for
    a model with an operation that has none.
    """
    losses = LossModule(model, loss)
    before = _state(losses)
    for _ in train(model, loss, collate, rows, settings):
        model.eval()
        after = _state(losses)
        yield _effect(losses, queries, before, after)
        before = after


def _state(losses: nn.Module) -> tuple[Named, Named]:
    """Return copies of the weights and of the buffers, such as a batch norm's statistics, which training moves too."""
    weights = {name: weight.detach().clone() for name, weight in losses.named_parameters()}
    return weights, {name: buffer.detach().clone() for name, buffer in losses.named_buffers()}


def _effect(losses: nn.Module, queries: Batch, before: tuple[Named, Named], after: tuple[Named, Named]) -> StepEffect:
    weights, buffers = before

    def at(weights: Named) -> Tensor:
        return functional_call(losses, (weights, buffers), (queries,))

    step = {name: weights[name] - after[0][name] for name in weights}
    start, first_order = along(at, weights, step, "TracInIdeal cannot follow this model")
    with torch.no_grad():
        return StepEffect(start - functional_call(losses, after, (queries,)), first_order)
