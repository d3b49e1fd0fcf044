"""The training loop behind launch/train.py: plain mini-batch training that leaves checkpoints.

Example order comes from counters keyed by (seed, epoch), so a run can be repeated, and a stopped one goes on from its last
checkpoint to the same bits; ordinary dropout is on here and only here.
"""

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.counters import derive_key, permutation

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda _: 1.0, "linear": lambda done: 1.0 - done}


@dataclass(frozen=True)
class TrainSettings:
    """How to train; `trainable` are globs over parameter names."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    schedule: str = "constant"
    weight_decay: float = 0.0
    trainable: tuple[str, ...] = ("*",)
    checkpoints: int = 3  # spread evenly over the steps, the last one at the end
    seed: int = 0


@dataclass(frozen=True)
class TrainState:
    """What a run needs beside the weights to go on after a step."""

    step: int
    optimizer: dict[str, Any]  # its state_dict
    random: list[Tensor]  # of torch's generators, the CPU's first, from which ordinary dropout draws


@dataclass(frozen=True)
class Step:
    """The state after one optimizer step; `checkpoint` says that this is one to keep."""

    step: int
    epoch: float
    learning_rate: float
    loss: float  # mean over the step's batch
    checkpoint: bool
    state: Callable[[], TrainState] = field(compare=False)  # to be saved beside the weights, before the next step


def freeze(model: nn.Module, trainable: tuple[str, ...]) -> int:
    """Let only the matching parameters train; return how many numbers they hold. Raises ValueError if none matches."""
    count = 0
    for name, weight in model.named_parameters():
        on = any(fnmatch.fnmatchcase(name, pattern) for pattern in trainable)
        weight.requires_grad_(on)
        count += weight.numel() if on else 0
    if count == 0:
        raise ValueError(f"train.trainable={list(trainable)} matches no parameter of {type(model).__name__}")
    return count


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    collate: Callable[[list[Any]], Batch],
    rows: list[Any],
    settings: TrainSettings,
    state: TrainState | None = None,
) -> Iterator[Step]:
    """Train in place and yield after every step, so that the caller saves, prints or stops.

    Given the state of a step, and a model with its weights, go on behind it.

    Raises FloatingPointError naming step and ids when the loss is not finite.
    """
    freeze(model, settings.trainable)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = _OPTIMIZERS[settings.optimizer](weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if state:
        optimizer.load_state_dict(state.optimizer)
        torch.set_rng_state(state.random[0])
        torch.cuda.set_rng_state_all(state.random[1:])
    device = weights[0].device
    per_epoch = -(-len(rows) // settings.batch_size)
    total = per_epoch * settings.epochs
    kept = {round(total * (i + 1) / settings.checkpoints) for i in range(settings.checkpoints)}
    first = state.step + 1 if state else 1
    for step in range(first, total + 1):
        epoch, position = divmod(step - 1, per_epoch)
        if position == 0 or step == first:
            order = permutation(derive_key(settings.seed, "order", epoch), len(rows))
        chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
        rate = settings.learning_rate * _SCHEDULES[settings.schedule]((step - 1) / total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mean = _step(model, loss, collate([rows[i] for i in chosen]).to(device), optimizer, step)
        yield Step(step, step / per_epoch, rate, mean, step in kept, partial(_state, optimizer, step))


def _state(optimizer: torch.optim.Optimizer, step: int) -> TrainState:
    random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return TrainState(step, optimizer.state_dict(), random)


def _step(model: nn.Module, loss: Callable, batch: Batch, optimizer: torch.optim.Optimizer, step: int) -> float:
    model.train()  # the caller may have evaluated between two steps
    losses = loss(model, batch)
    if not torch.isfinite(losses).all():
        bad = batch.ids[~torch.isfinite(losses.detach().cpu())].tolist()
        raise FloatingPointError(f"training loss is not finite at step {step} for examples {bad[:5]}: lower the rate")
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
    return float(losses.detach().mean())
