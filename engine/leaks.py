"""What turn-over dropout does not keep out: the ways in which training on z reaches the sub-network f^m̃(z)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.batches import Batch
from engine.masks import Side
from engine.norms import CHANNELS_SECOND
from engine.turnover import Loss, TurnOver, evaluating


@dataclass(frozen=True)
class Leak:
    """One way; `share` of the parameter's numbers are used by both f^m(z) and f^m̃(z)."""

    name: str
    kind: str  # bias | norm | shared layer | batch statistics | weight decay | momentum
    share: float


def leaks(
    turnover: TurnOver,
    loss: Loss,
    batch: Batch,  # training examples to look at; every one costs two backward passes
    weight_decay: float = 0.0,
    momentum: bool = False,  # also Adam's
) -> list[Leak]:
    """Return every leak of a training with these settings, the widest first within each kind.

    A number leaks if training on z changes it (a gradient under m(z)) and f^m̃(z) uses it (a gradient under m̃(z)). The
    share is a mean over the batch. Decay and momentum move what z's own mask leaves alone, in every step; the statistics
    of a batch norm mix the whole batch. Frozen parameters do not leak.
    """
    trained = {name: w for name, w in turnover.model.named_parameters() if w.requires_grad}
    shares = dict.fromkeys(trained, 0.0)
    with evaluating(turnover):
        for position in range(len(batch)):
            one = batch.take([position])
            own, flipped = (_used(turnover, loss, one, side, list(trained.values())) for side in ("own", "flipped"))
            for name, a, b in zip(trained, own, flipped, strict=True):
                shares[name] += float((a & b).double().mean())
    found = [Leak(name, _kind(turnover.model, name), share / len(batch)) for name, share in shares.items() if share]
    found += [
        Leak(name, "batch statistics", 1.0)
        for name, module in turnover.model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
    found += [Leak("all trained weights", "weight decay", 1.0)] if weight_decay else []
    found += [Leak("all trained weights", "momentum", 1.0)] if momentum else []
    return sorted(found, key=lambda leak: (leak.kind, -leak.share, leak.name))


def _used(turnover: TurnOver, loss: Loss, one: Batch, side: Side, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return which numbers of each weight the loss under this side of z's mask depends on."""
    turnover.use(one.ids, side)
    value = loss(turnover.model, one).sum()
    gradients = torch.autograd.grad(value, list(weights), allow_unused=True, materialize_grads=True)
    return [gradient != 0 for gradient in gradients]


def _kind(model: nn.Module, name: str) -> str:
    place, _, leaf = name.rpartition(".")
    module = model.get_submodule(place)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, *CHANNELS_SECOND)) or "norm" in type(module).__name__.lower():
        return "norm"
    return "bias" if leaf.endswith("bias") else "shared layer"
