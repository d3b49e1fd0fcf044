"""The training loop behind launch/train.py: plain mini-batch training that leaves checkpoints.

Example order comes from counters keyed by (seed, epoch), so a run can be repeated, and a stopped one goes on from its last
checkpoint to the same bits; ordinary dropout is on here and only here.

Several processes may train one model (Group): each takes its share of every batch, and the gradients are summed, so that a
step is that of the whole batch and the model is the one-process one to rounding, whatever their number. Turn-over masks
follow from ids alone and are the same wherever an example lies. Ordinary dropout is drawn from (seed, step, process): no two
processes share a stream and a repetition or a resumed run draws the same, but another number of them draws other values.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    random: list[Tensor]  # of torch's generators, the CPU's first, from which ordinary dropout draws; none of a group


@dataclass(frozen=True)
class Step:
    """The state after one optimizer step; `checkpoint` says that this is one to keep."""

    step: int
    epoch: float
    learning_rate: float
    loss: float  # mean over the step's batch
    checkpoint: bool
    state: Callable[[], TrainState] = field(compare=False)  # to be saved beside the weights, before the next step


@dataclass(frozen=True)
class Group:
    """The processes that train one model together, and which of them this one is; by default it is alone."""

    rank: int = 0
    size: int = 1
    add: Callable[[Tensor], object] = lambda tensor: None  # puts the sum over all processes in the tensor's place

    @classmethod
    def joined(cls) -> "Group":
        """Return the processes that torch.distributed has joined."""
        return cls(distributed.get_rank(), distributed.get_world_size(), distributed.all_reduce)


ALONE = Group()


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
    group: Group = ALONE,
) -> Iterator[Step]:
    """Train in place and yield after every step, so that the caller saves, prints or stops.

    Given the state of a step, and a model with its weights, go on behind it. In a group every process calls this with the
    same arguments and goes through the same steps; what it yields is of the whole batch.

    Raises FloatingPointError naming step and ids when the loss is not finite; ValueError for BatchNorm in a group.
    """
    freeze(model, settings.trainable)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = _OPTIMIZERS[settings.optimizer](weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if state:
        _restore(optimizer, state)
    device = weights[0].device
    per_epoch = -(-len(rows) // settings.batch_size)
    total = per_epoch * settings.epochs
    kept = {round(total * (i + 1) / settings.checkpoints) for i in range(settings.checkpoints)}
    first = state.step + 1 if state else 1
    if group.size > 1:
        _check_group(model, first, device, group)
    for step in range(first, total + 1):
        epoch, position = divmod(step - 1, per_epoch)
        if position == 0 or step == first:
            order = permutation(derive_key(settings.seed, "order", epoch), len(rows))
        chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
        rate = settings.learning_rate * _SCHEDULES[settings.schedule]((step - 1) / total)
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate
        if group.size > 1:
            torch.manual_seed(derive_key(settings.seed, "dropout", step, group.rank) % 2**63)
        share = [rows[i] for i in chosen[group.rank :: group.size]]
        losses = _backward(model, loss, collate(share).to(device) if share else None, weights, len(chosen), group)
        if not torch.isfinite(losses).all():
            _refuse(collate([rows[i] for i in chosen[~torch.isfinite(losses).cpu().numpy()]]), step)
        optimizer.step()
        state_then = partial(_state, optimizer, step, group)
        yield Step(step, step / per_epoch, rate, float(losses.mean()), step in kept, state_then)


def _restore(optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    optimizer.load_state_dict(state.optimizer)
    if state.random:
        torch.set_rng_state(state.random[0])
        torch.cuda.set_rng_state_all(state.random[1:])


def _state(optimizer: torch.optim.Optimizer, step: int, group: Group) -> TrainState:
    random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()] if group.size == 1 else []
    return TrainState(step, optimizer.state_dict(), random)


def _backward(
    model: nn.Module,
    loss: Callable,
    batch: Batch | None,  # this process's share, if it has one
    weights: Sequence[Tensor],
    count: int,  # of the whole batch
    group: Group,
) -> Tensor:
    """Leave in the weights the gradient of the mean loss of the whole batch, and return its losses [count]."""
    model.train()  # the caller may have evaluated between two steps
    for weight in weights:
        weight.grad = None
    if batch is None:
        losses = weights[0].new_zeros(0)
    else:
        losses = loss(model, batch)
        (losses.sum() / count).backward()
    return losses.detach() if group.size == 1 else _summed(losses.detach(), weights, count, group)


def _summed(losses: Tensor, weights: Sequence[Tensor], count: int, group: Group) -> Tensor:
    """Put the sum over all processes in each gradient's place, and return the losses of the whole batch in its order.

    One reduction carries everything. A weight that no process's share reaches keeps no gradient, as in a single process.
    """
    whole = losses.new_zeros(count)
    whole[group.rank :: group.size] = losses
    reached = torch.tensor([float(w.grad is not None) for w in weights], device=losses.device)
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    flat = torch.cat([whole, reached, *(gradient.flatten() for gradient in gradients)])
    group.add(flat)
    whole, reached, *summed = flat.split([count, len(weights), *(w.numel() for w in weights)])
    for weight, on, gradient in zip(weights, reached.tolist(), summed, strict=True):
        weight.grad = gradient.view_as(weight).to(weight.dtype) if on else None
    return whole


def _check_group(model: nn.Module, first: int, device: torch.device, group: Group) -> None:
    """Raise ValueError for a model whose examples depend on each other; OSError unless all begin at the same step."""
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has BatchNorm, whose statistics would be those of each process's share of a batch: "
            f"train it in one process, or use GroupNorm."
        )
    steps = torch.tensor([first], device=device)
    group.add(steps)
    if int(steps) != first * group.size:
        raise OSError(
            f"process {group.rank} of {group.size} would go on with step {first}, others with another one: do all see the "
            f"same folder of checkpoints?"
        )


def _refuse(bad: Batch, step: int) -> None:
    """Raise FloatingPointError for the examples whose loss is not finite."""
    raise FloatingPointError(
        f"training loss is not finite at step {step} for examples {bad.ids.tolist()[:5]}: lower the rate"
    )
