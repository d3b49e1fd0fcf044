"""The chosen weights of a model as one vector: parameter by parameter, in the (O, I) orientation of gradient rows.

A vector of this space, cut per parameter, is what a projector multiplies per-example gradients with, and column by column
what curvature products take and give. A weight that the gradient hooks cannot take (a convolution's) keeps its own shape.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.parameters import matching, supported_parameters


@dataclass(frozen=True)
class Weight:
    """One chosen weight: its name in model.named_parameters(), its shape there, and whether (O, I) is its transpose."""

    name: str
    shape: tuple[int, ...]
    turned: bool

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Coordinates:
    """The map between blocks of flat vectors and the weights' own tensors."""

    weights: tuple[Weight, ...]

    @property
    def size(self) -> int:
        return sum(w.size for w in self.weights)

    def split(self, block: Tensor) -> dict[str, Tensor]:
        """Return name -> [k, O·I] for a (size, k) block: what projectors.Dense takes, and stores and states hold."""
        parts = block.T.split([w.size for w in self.weights], dim=1)
        return {w.name: part for w, part in zip(self.weights, parts, strict=True)}

    def join(self, arrays: dict[str, Tensor]) -> Tensor:
        """Return the (size, k) float64 block of name -> [k, O·I] arrays, such as whole gradient rows."""
        return torch.cat([arrays[w.name].double() for w in self.weights], dim=1).T.contiguous()

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """Return one tensor in each weight's own shape, for a flat vector (size,)."""
        parts = vector.split([w.size for w in self.weights])
        return [
            part.view(w.shape[::-1]).T if w.turned else part.view(w.shape)
            for w, part in zip(self.weights, parts, strict=True)
        ]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the flat vector (size,) of one tensor per weight, in its own shape."""
        return torch.cat([(t.T if w.turned else t).reshape(-1) for w, t in zip(self.weights, tensors, strict=True)])


def chosen_coordinates(model: nn.Module, patterns: Iterable[str]) -> Coordinates:
    """Return the space of the weights whose own name, or the name of a module around them, matches a glob.

    Raises ValueError for a pattern that matches nothing.
    """
    chosen = matching(model, patterns)
    roles = {p.name: p.uses[0].role for p in supported_parameters(model)[0]}
    turned = ("conv1d", "embedding")
    return Coordinates(
        tuple(
            Weight(name, tuple(weight.shape), roles.get(name) in turned)
            for name, weight in model.named_parameters()
            if name in chosen
        )
    )


def flat_coordinates(sizes: dict[str, int]) -> Coordinates:  # in the model's order
    """Return the space of whole gradient rows without the model: to join and split them, not for the weights' tensors."""
    return Coordinates(tuple(Weight(name, (size,), False) for name, size in sizes.items()))


def top_layers(model: nn.Module, count: int = 2) -> list[str]:
    """Return the names of the weights in the last `count` layers and all that comes after them: pooler, norm, head.

    The layers are the longest ModuleList. A tied head counts as the embedding that it is. A model without layers: all.
    FastIF takes the same part of BERT: layers 10 and 11, pooler and classifier.
    """
    names = [name for name, _ in model.named_parameters()]
    stacks = [(len(m), name) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        return names
    length, stack = max(stacks)
    first = f"{stack}.{max(0, length - count)}."
    start = next((i for i, name in enumerate(names) if name.startswith(first)), 0)
    return names[start:]
