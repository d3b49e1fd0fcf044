"""What one pass over a batch gives, and what is asked of it: one loss an example, every number finite."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from engine.projection import RowLayout


@dataclass(frozen=True)
class GradientBatch:
    """What one pass over B examples gives, in the batch's order."""

    ids: Tensor  # int64 [B]
    losses: Tensor  # float64 [B]
    arrays: dict[str, Tensor]  # name -> float32 (or the model's wider dtype) [B, columns]
    norms: Tensor | None  # [B, parameters], exact ‖∇‖₂ of each parameter; None if not asked for


def joined(parts: list[GradientBatch]) -> GradientBatch:
    """Return one batch of all examples, in their order."""
    arrays = {name: torch.cat([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    norms = None if parts[0].norms is None else torch.cat([cast(Tensor, part.norms) for part in parts])
    return GradientBatch(
        torch.cat([part.ids for part in parts]), torch.cat([part.losses for part in parts]), arrays, norms
    )


def check_losses(losses: Tensor, size: int) -> None:
    """Raise ValueError unless the loss gave one number per example."""
    if losses.shape != (size,):
        raise ValueError(
            f"the task's loss returned shape {tuple(losses.shape)} for {size} examples: it must return one loss per "
            f"example, shape ({size},), summed over the example's tokens and never over the batch."
        )


def nonfinite(batch: GradientBatch, layout: RowLayout) -> dict[int, str]:
    """Return, for every example with a NaN or infinity, its position and where: the loss or the first such parameter."""
    found: dict[int, str] = {}
    for position in torch.nonzero(~torch.isfinite(batch.losses)).flatten().tolist():
        found[position] = "the loss"
    for name, array in batch.arrays.items():
        # a sum over what is not finite is not finite, and cheaper to look at
        for position in torch.nonzero(~torch.isfinite(array.sum(1))).flatten().tolist():
            if torch.isfinite(array[position]).all():
                continue  # only their sum is too large
            bad = torch.nonzero(~torch.isfinite(array[position])).flatten()[0].item()
            here = next((r.parameter for r in layout.ranges if r.array == name and r.start <= bad < r.stop), name)
            found.setdefault(position, "the gradient" if here == "*" else f"the gradient of {here}")
    if batch.norms is not None:  # too large for its square, though not for itself
        for position in torch.nonzero(~torch.isfinite(batch.norms).all(1)).flatten().tolist():
            found.setdefault(position, "the norm of the gradient")
    return found
