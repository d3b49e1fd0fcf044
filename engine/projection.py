"""Projections of per-example gradients, and where each parameter's columns stand in a stored row.

A gradient of one weight matrix is G = Σ_t δ_t x_tᵀ, (O, I). Four ways to keep it:
  none         all O·I numbers, one array per parameter
  two-sided    G₁ G G₂ᵀ with G₁ (k, O), G₂ (k, I): TracIn appendix F; a side with no more than k rows stays as it is
  gaussian     one d-vector for the whole gradient, entries N(0, 1/d): TracIn appendix E
  rademacher   the same with entries ±1/√d
Every matrix follows from (seed, parameter, side, position) by integer counters, is drawn on the CPU in float64 and then
cast, so it is equal on every worker, device and dtype. All are unbiased: E⟨Pa, Pb⟩ = ⟨a, b⟩.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from engine.counters import derive_key, normals, signs
from engine.parameters import Parameter

Kind = Literal["none", "two-sided", "gaussian", "rademacher"]
MAX_UNPROJECTED = 65_536  # columns of one parameter that a store takes unprojected
MAX_DENSE = 2**31  # entries d · p of a dense projection
_ALIGN = 256  # columns of an inner chunk of the store: ranges start on a multiple


@dataclass(frozen=True)
class Projection:
    """What is kept of each gradient. `dim` is k for two-sided (per side) and d for the dense kinds."""

    kind: Kind = "two-sided"
    dim: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Range:
    """The columns [start, stop) of one array that belong to one parameter, or to all vectors together."""

    parameter: str
    array: str
    start: int
    stop: int
    rows: int  # output side, kept
    columns: int  # input side, kept; 1 for a vector


@dataclass(frozen=True)
class RowLayout:
    """The arrays of a stored row with their widths, and every parameter's place in them."""

    arrays: dict[str, int]
    ranges: tuple[Range, ...] = field(default=())

    def of(self, parameter: str) -> Range:
        return next(r for r in self.ranges if r.parameter == parameter)


def matrix(kind: str, key: int, rows: int, columns: int, first: int = 0, count: int | None = None) -> Tensor:
    """Return columns first … first + count of the random (rows, columns) matrix of this key, float32.

    Entries have mean 0 and variance 1/rows. Column c takes positions c·rows … (c + 1)·rows − 1 of the stream, so a
    block of columns (some tokens of a vocabulary) is drawn without the rest.
    """
    count = columns - first if count is None else count
    draw = normals if kind == "gaussian" else signs
    out = np.empty((count, rows), dtype=np.float32)
    step = max(1, (1 << 24) // rows)
    for begin in range(0, count, step):
        size = min(step, count - begin)
        block = draw(key, (first + begin) * rows, size * rows)
        out[begin : begin + size] = (block / np.sqrt(rows)).reshape(size, rows)
    return torch.from_numpy(out).T


def side_matrix(projection: Projection, parameter: str, side: str, width: int) -> Tensor | None:
    """Return G₁ or G₂, (k, width) with entries N(0, 1/k); None where the side is kept as it is."""
    if width <= projection.dim:
        return None
    return matrix("gaussian", derive_key(projection.seed, parameter, side), projection.dim, width)


def dense_matrix(projection: Projection, parameter: Parameter) -> Tensor:
    """Return this parameter's columns (d, O·I) of the one dense projection of the whole gradient."""
    key = derive_key(projection.seed, parameter.name, "dense")
    return matrix(projection.kind, key, projection.dim, parameter.size)


def row_layout(parameters: list[Parameter], projection: Projection) -> RowLayout:
    """Return the arrays and ranges that rows of these parameters have under this projection.

    Raises ValueError for a parameter too wide to store unprojected, and for a dense projection of more than 2^31 entries.
    """
    if projection.kind == "none":
        wide = [p for p in parameters if p.size > MAX_UNPROJECTED]
        if wide:
            raise ValueError(
                f"gradients.projection=none is not allowed for {wide[0].name}: {wide[0].size} numbers a row, at most "
                f"{MAX_UNPROJECTED}. Choose smaller gradients.modules, gradients.projection=two-sided, or no store."
            )
        return _separate(parameters)
    if projection.kind == "two-sided":
        return _concatenated(parameters, projection.dim)
    total = sum(p.size for p in parameters)
    if projection.dim * total > MAX_DENSE:
        raise ValueError(
            f"gradients.projection={projection.kind} with gradients.dim={projection.dim} needs {projection.dim * total} "
            f"numbers for {total} parameters: at most 2^31. Use gradients.projection=two-sided, or fewer modules."
        )
    return RowLayout({"rows": projection.dim}, (Range("*", "rows", 0, projection.dim, projection.dim, 1),))


def unprojected_layout(parameters: list[Parameter]) -> RowLayout:
    """Return the layout of whole gradients, whatever their size: for query gradients that are held, not stored."""
    return _separate(parameters)


def _separate(parameters: list[Parameter]) -> RowLayout:
    ranges = tuple(Range(p.name, p.name, 0, p.size, p.out_features, max(1, p.in_features)) for p in parameters)
    return RowLayout({p.name: p.size for p in parameters}, ranges)


def _concatenated(parameters: list[Parameter], k: int) -> RowLayout:
    """Return one array: each matrix's (kO × kI) block on an inner-chunk boundary, then all vectors side by side."""
    ranges, stop = [], 0
    for parameter in (p for p in parameters if not p.is_vector):
        rows, columns = min(k, parameter.out_features), min(k, parameter.in_features)
        start = _aligned(stop)
        stop = start + rows * columns
        ranges.append(Range(parameter.name, "rows", start, stop, rows, columns))
    stop = _aligned(stop)
    for parameter in (p for p in parameters if p.is_vector):
        rows = min(k, parameter.out_features)
        ranges.append(Range(parameter.name, "rows", stop, stop + rows, rows, 1))
        stop += rows
    return RowLayout({"rows": stop}, tuple(ranges))


def _aligned(column: int) -> int:
    return -(-column // _ALIGN) * _ALIGN
