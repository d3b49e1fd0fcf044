"""The two factors of a per-example gradient G = Σ_t a_t b_tᵀ, and exact norms from them.

A factor is dense, or a list of indices that stand for one-hot vectors (the vocabulary side of an embedding). Norms use
‖G‖² = Σ_{t,s} (a_t·a_s)(b_t·b_s), TracIn appendix F extended to sequences, or G itself where that is cheaper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_MATERIALISED = 1 << 24  # numbers of full gradients held at a time


@dataclass(frozen=True)
class Factor:
    """[B, T, n] vectors, or with `one_hot` = n: [B, T] indices of one-hot vectors of that length."""

    values: Tensor
    one_hot: int = 0

    @property
    def width(self) -> int:
        return self.one_hot or self.values.shape[-1]

    @cached_property
    def gram(self) -> Tensor:
        """[B, T, T]: the dot products of its own vectors; made once, as modules that share an input share its factor."""
        return gram(self, self)

    def project(self, matrix: Tensor | None) -> Tensor:
        """Return [B, T, k]: every vector times the (k, n) matrix; unchanged, and dense, without one.

        Vectors that are projected already, k long, stay as they are: a projection always shortens.
        """
        if self.one_hot:
            if matrix is None:
                return F.one_hot(self.values, self.one_hot).float()
            return matrix.T[self.values]
        if matrix is None or self.width == len(matrix):
            return self.values
        return self.values @ matrix.T.to(self.values.dtype)


def gradient_vector(a: Factor, b: Factor) -> Tensor:
    """Return the whole gradients, [B, O·I]."""
    if a.one_hot and not b.one_hot:
        return gradient_vector(b, a).reshape(len(b.values), b.width, a.width).transpose(1, 2).flatten(1)
    if b.one_hot:
        dense = a.values
        out = dense.new_zeros(dense.shape[0], b.width, a.width)
        index = b.values.unsqueeze(-1).expand_as(dense)
        return out.scatter_add_(1, index, dense).transpose(1, 2).flatten(1)
    return torch.bmm(a.values.transpose(1, 2), b.values).flatten(1)


def gram(a: Factor, b: Factor) -> Tensor:
    """Return [B, T, S]: the dot products of every vector of one factor with every vector of the other, per example."""
    if a.one_hot and b.one_hot:
        return (a.values.unsqueeze(2) == b.values.unsqueeze(1)).float()
    if a.one_hot:
        return gram(b, a).transpose(1, 2)
    if b.one_hot:
        index = b.values.unsqueeze(1).expand(-1, a.values.shape[1], -1)
        return a.values.gather(2, index)
    return torch.bmm(a.values, b.values.transpose(1, 2))


def squared_norm(calls: list[tuple[Factor, Factor]]) -> Tensor:
    """Return [B]: ‖Σ over calls of Σ_t a_t b_tᵀ‖², cross terms between the calls included. Exact."""
    if len({(a.one_hot, b.one_hot) for a, b in calls}) == 1:  # calls of one kind are one call with the tokens of all
        tokens = sum(a.values.shape[1] for a, _ in calls)
        if _cheaper_materialised(*calls[0], tokens):
            a, b = calls[0] if len(calls) == 1 else (side_by_side(side) for side in zip(*calls, strict=True))
            return _materialised_norm(a, b)
    total = torch.zeros(len(calls[0][0].values), device=calls[0][0].values.device, dtype=torch.float64)
    for i, (a, b) in enumerate(calls):
        for j, (c, d) in enumerate(calls[: i + 1]):
            if i == j:
                total += _products(a.gram, b.gram)
            else:
                total += 2 * _products(gram(a, c), gram(b, d))
    return total


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return [B] float64: each example's products of both [T, S], added up."""
    a, b = in_one_precision(a, b)
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).double()


def side_by_side(factors: Sequence[Factor]) -> Factor:
    """Return one factor with the tokens of all."""
    return Factor(torch.cat([factor.values for factor in factors], 1), factors[0].one_hot)


def in_one_precision(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider of their precisions, at least float32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _cheaper_materialised(a: Factor, b: Factor, tokens: int) -> bool:
    """Tell whether T·O·I multiplications are fewer than T²·(O + I); of one-hot vectors, whether all O are likely there."""
    if a.one_hot or b.one_hot:
        return not b.one_hot and tokens >= a.one_hot
    return a.width * b.width < tokens * (a.width + b.width)


def _materialised_norm(a: Factor, b: Factor) -> Tensor:
    step = max(1, _MATERIALISED // (a.width * b.width))
    parts = []
    for begin in range(0, len(a.values), step):
        window = slice(begin, begin + step)
        part = gradient_vector(Factor(a.values[window], a.one_hot), Factor(b.values[window]))
        parts.append(part.square().sum(1).double())
    return torch.cat(parts)
