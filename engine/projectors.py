"""Adding one call's gradient to the rows: one class per way of keeping it.

A projector has a `layout` (the arrays it fills) and adds the gradient of a matrix, given by its factors, or of a vector.
Rows are linear in the gradient, so calls of a shared module simply add up.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.factors import Factor, gradient_vector, in_one_precision
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

Sums = dict[str, Tensor]
_MATERIALISED = 1 << 25  # numbers of full gradients, or of what stands in their place, held at a time
_MOVED = 50  # multiplications of a product that take as long as writing and reading one number of a gradient


class Projector(Protocol):
    """Where per-example gradients go."""

    layout: RowLayout

    def reduce_input(self, parameter: Parameter, b: Factor) -> Factor: ...  # all that add_matrix needs of an input

    # sums, empty at first: [B, columns] by parameter, or by array where each parameter's part goes into all of it
    def add_matrix(self, sums: Sums, parameter: Parameter, a: Factor, b: Factor) -> None: ...
    def add_vector(self, sums: Sums, parameter: Parameter, gradient: Tensor) -> None: ...
    def arrays(self, sums: Sums, like: Tensor) -> dict[str, Tensor]: ...  # the stored arrays, of examples as `like` has


class TwoSided:
    """G₁ (Σ_t δ_t x_tᵀ) G₂ᵀ per matrix, G₁ g per vector: TracIn appendix F, summed over tokens."""

    def __init__(
        self, parameters: list[Parameter], projection: Projection, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layout = row_layout(parameters, projection)
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

    def add_matrix(self, sums: Sums, parameter: Parameter, a: Factor, b: Factor) -> None:
        left, right = self._sides[parameter.name]
        output, inner = in_one_precision(a.project(left), b.project(right))
        _add(sums, parameter.name, torch.bmm(output.transpose(1, 2), inner).flatten(1))

    def add_vector(self, sums: Sums, parameter: Parameter, gradient: Tensor) -> None:
        left, _ = self._sides[parameter.name]
        _add(sums, parameter.name, _wide(gradient if left is None else gradient @ left.T.to(gradient.dtype)))

    def arrays(self, sums: Sums, like: Tensor) -> dict[str, Tensor]:
        """Return the rows: every parameter's block in its place, zeros where there is none."""
        found, stop = [], 0
        for here in self.layout.ranges:
            if here.parameter in sums:
                found += [like.new_zeros(len(like), here.start - stop), sums[here.parameter]]
                stop = here.stop
        return {"rows": torch.cat([*found, like.new_zeros(len(like), self.layout.arrays["rows"] - stop)], 1)}


def _add(sums: Sums, name: str, block: Tensor) -> None:
    sums[name] = sums[name] + block if name in sums else block


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _transposed(side: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Return the (k, n) matrix as the transpose of a contiguous one: thin products with it are faster."""
    return None if side is None else side.T.to(device=device, dtype=dtype).contiguous().T


class Whole:
    """Every gradient as it is: projection `none`."""

    def __init__(self, parameters: list[Parameter], stored: bool = True) -> None:
        self.layout = row_layout(parameters, Projection("none")) if stored else unprojected_layout(parameters)

    def reduce_input(self, parameter: Parameter, b: Factor) -> Factor:
        return b

    def add_matrix(self, sums: Sums, parameter: Parameter, a: Factor, b: Factor) -> None:
        _add(sums, parameter.name, _wide(gradient_vector(a, b)))

    def add_vector(self, sums: Sums, parameter: Parameter, gradient: Tensor) -> None:
        _add(sums, parameter.name, _wide(gradient))

    def arrays(self, sums: Sums, like: Tensor) -> dict[str, Tensor]:
        return {n: sums.get(n, like.new_zeros(len(like), width)) for n, width in self.layout.arrays.items()}


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

    def add_matrix(self, sums: Sums, parameter: Parameter, a: Factor, b: Factor) -> None:
        columns, tokens = len(self._blocks[parameter.name]), a.values.shape[1]
        if a.one_hot or b.one_hot or (columns - 1) * (tokens - 1) <= _MOVED:
            held, products = columns * tokens * min(parameter.out_features, parameter.in_features), self._from_factors
        else:
            held, products = parameter.size, self._from_gradient
        step = max(1, _MATERIALISED // held)
        parts = [
            products(parameter, Factor(x, a.one_hot), Factor(y, b.one_hot))
            for x, y in zip(a.values.split(step), b.values.split(step), strict=True)
        ]
        _add(sums, self._array, torch.cat(parts))

    def _from_gradient(self, parameter: Parameter, a: Factor, b: Factor) -> Tensor:
        return self._times(gradient_vector(a, b), parameter)

    def _from_factors(self, parameter: Parameter, a: Factor, b: Factor) -> Tensor:
        """Return Σ_t a_tᵀ V_k b_t for the columns k, [B, d]; the gradients themselves are never made."""
        block = self._blocks[parameter.name].view(-1, parameter.out_features, parameter.in_features)
        if b.one_hot or (b.width > a.width and not a.one_hot):
            a, b, block = b, a, block.transpose(1, 2)  # now a is the longer of the two, or one-hot
        rows = b.values.flatten(0, 1)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        long = a.values.flatten(0, 1)
        through = block[:, long].to(dtype) if a.one_hot else long.to(dtype) @ block.to(dtype)
        products = torch.linalg.vecdot(through, rows.to(dtype))  # [d, B·T]
        return products.view(len(block), len(b.values), -1).sum(2).T

    def add_vector(self, sums: Sums, parameter: Parameter, gradient: Tensor) -> None:
        _add(sums, self._array, self._times(gradient, parameter))

    def arrays(self, sums: Sums, like: Tensor) -> dict[str, Tensor]:
        return {n: sums.get(n, like.new_zeros(len(like), width)) for n, width in self.layout.arrays.items()}

    def _times(self, gradient: Tensor, parameter: Parameter) -> Tensor:
        gradient = _wide(gradient)
        return gradient @ self._blocks[parameter.name].T.to(gradient.dtype)


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
