"""Adding one call's gradient to the rows: one class per way of keeping it.

A projector has a `layout` (the arrays it fills) and adds the gradient of a matrix, given by its factors, or of a vector.
Rows are linear in the gradient, so calls of a shared module simply add up.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.factors import Factor, gradient_vector
from engine.parameters import Parameter
from engine.projection import (
    Projection,
    Range,
    RowLayout,
    dense_matrix,
    row_layout,
    side_matrix,
    unprojected_layout,
)

_MATERIALISED = 1 << 25  # numbers of full gradients held at a time


class Projector(Protocol):
    """Where per-example gradients go."""

    layout: RowLayout

    def reduce_input(self, parameter: Parameter, b: Factor) -> Factor: ...  # all that add_matrix needs of an input
    def add_matrix(self, arrays: dict[str, Tensor], parameter: Parameter, a: Factor, b: Factor) -> None: ...
    def add_vector(self, arrays: dict[str, Tensor], parameter: Parameter, gradient: Tensor) -> None: ...


class TwoSided:
    """G₁ (Σ_t δ_t x_tᵀ) G₂ᵀ per matrix, G₁ g per vector: TracIn appendix F, summed over tokens."""

    def __init__(
        self, parameters: list[Parameter], projection: Projection, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layout = row_layout(parameters, projection)
        self._ranges = {r.parameter: r for r in self.layout.ranges}
        self._sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for p in parameters:
            left = side_matrix(projection, p.name, "output", p.out_features)
            right = None if p.is_vector else side_matrix(projection, p.name, "input", p.in_features)
            moved = [_transposed(side, device, dtype) for side in (left, right)]
            self._sides[p.name] = (moved[0], moved[1])

    def reduce_input(self, parameter: Parameter, b: Factor) -> Factor:
        return Factor(b.project(self._sides[parameter.name][1]))

    def reduce_output(self, parameter: Parameter, a: Factor) -> Factor:
        return Factor(a.project(self._sides[parameter.name][0]))

    def add_matrix(self, arrays: dict[str, Tensor], parameter: Parameter, a: Factor, b: Factor) -> None:
        left, right = self._sides[parameter.name]
        here = self._ranges[parameter.name]
        out = arrays["rows"]
        block = torch.bmm(a.project(left).to(out.dtype).transpose(1, 2), b.project(right).to(out.dtype))
        out[:, here.start : here.stop] += block.flatten(1)

    def add_vector(self, arrays: dict[str, Tensor], parameter: Parameter, gradient: Tensor) -> None:
        left, _ = self._sides[parameter.name]
        here = self._ranges[parameter.name]
        out = arrays["rows"]
        out[:, here.start : here.stop] += (gradient if left is None else gradient @ left.T.to(gradient.dtype)).to(
            out.dtype
        )


def _transposed(side: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Return the (k, n) matrix as the transpose of a contiguous one: thin products with it are faster."""
    return None if side is None else side.T.to(device=device, dtype=dtype).contiguous().T


class Whole:
    """Every gradient as it is: projection `none`."""

    def __init__(self, parameters: list[Parameter], stored: bool = True) -> None:
        self.layout = row_layout(parameters, Projection("none")) if stored else unprojected_layout(parameters)

    def reduce_input(self, parameter: Parameter, b: Factor) -> Factor:
        return b

    def add_matrix(self, arrays: dict[str, Tensor], parameter: Parameter, a: Factor, b: Factor) -> None:
        arrays[parameter.name] += gradient_vector(a, b).to(arrays[parameter.name].dtype)

    def add_vector(self, arrays: dict[str, Tensor], parameter: Parameter, gradient: Tensor) -> None:
        arrays[parameter.name] += gradient.to(arrays[parameter.name].dtype)


class Dense:
    """The product of the whole gradient with one (d, p) matrix, given as (d, O·I) blocks per parameter.

    With random blocks this is TracIn's dense projection. With the gradients of d queries as blocks the result is their
    dot products with every example: how scores are made without a store, each gradient dropped after its product.
    """

    def __init__(self, blocks: dict[str, Tensor], array: str = "rows") -> None:
        self._blocks, self._array = blocks, array
        columns = next(iter(blocks.values())).shape[0]
        self.layout = RowLayout({array: columns}, (Range("*", array, 0, columns, columns, 1),))

    def reduce_input(self, parameter: Parameter, b: Factor) -> Factor:
        return b

    def add_matrix(self, arrays: dict[str, Tensor], parameter: Parameter, a: Factor, b: Factor) -> None:
        step = max(1, _MATERIALISED // parameter.size)
        out = arrays[self._array]
        for begin in range(0, len(out), step):
            window = slice(begin, begin + step)
            part = gradient_vector(Factor(a.values[window], a.one_hot), Factor(b.values[window], b.one_hot))
            out[window] += self._times(part, parameter, out.dtype)

    def add_vector(self, arrays: dict[str, Tensor], parameter: Parameter, gradient: Tensor) -> None:
        arrays[self._array] += self._times(gradient, parameter, arrays[self._array].dtype)

    def _times(self, gradient: Tensor, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        return gradient.to(dtype) @ self._blocks[parameter.name].T.to(dtype)


def make_projector(
    parameters: list[Parameter], projection: Projection, device: torch.device, dtype: torch.dtype
) -> Projector:
    """Return the projector of a stored row."""
    if projection.kind == "none":
        return Whole(parameters)
    if projection.kind == "two-sided":
        return TwoSided(parameters, projection, device, dtype)
    row_layout(parameters, projection)  # refuses what is too large before anything is drawn
    return Dense({p.name: dense_matrix(projection, p).to(device=device) for p in parameters})
