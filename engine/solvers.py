"""Solving (H + λI) x = b with products alone, for a block of right-hand sides at once.

    conjugate_gradient   (H + λI) x = b       Gauss-Newton; a direction of negative curvature stops it
    squared_gradient     (H² + λI) x = Hb     any symmetric H (Chen et al. 2020, equation 16): μ/(μ² + λ) for 1/(μ + λ)
    exact                either, by the eigenvectors of the whole matrix: small p, the oracle
LiSSA and the inverse-Hessian sketch are in stochastic_solvers.py. Each solver is a generator: it yields its whole state
after each step and returns a Solution. Started from a yielded state it goes on to the same bits. λ is absolute here; a
config's is relative to λ_max, or to λ_max² for the squared system.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from engine.counters import derive_key, normals
from engine.curvature import Operator, all_finite

CURVATURE = {"cg": "gauss-newton", "lissa": "gauss-newton", "squared-cg": "hessian", "sketch": "hessian"}  # defaults

State = TypeVar("State")
Result = TypeVar("Result")
MAX_EXACT = 16_384  # weights that a whole matrix is made for: 2 GiB


@dataclass(frozen=True)
class Solution:
    """A block of solutions and what is needed to trust it."""

    x: Tensor  # (size, k) float64
    residual: Tensor  # [k], of the solver's own system at x, relative, by products made for this figure
    converged: Tensor  # bool [k], the residual is within the tolerance asked for
    iterations: int
    damping: float  # λ_eff, absolute
    largest: float  # λ_max
    identity: Tensor  # [k], cosine of x and b: 1 means that the curvature changed nothing
    standard_error: Tensor | None = None  # (size, k), of a mean over repetitions


def finish(
    solver: Generator[State, None, Result],
    each: Callable[[State], None] = lambda state: None,  # sees every state: to save it, to count
) -> Result:
    """Run a solver to its end and return its result."""
    while True:
        try:
            each(next(solver))
        except StopIteration as end:
            return end.value


@dataclass(frozen=True)
class PowerState:
    iteration: int
    vector: Tensor  # (size, 1), of length 1
    value: float  # ‖H vector‖ so far
    settled: bool


def largest_eigenvalue(
    operator: Operator,
    ids: Tensor | None = None,
    tolerance: float = 1e-3,  # relative change of one step
    max_iterations: int = 100,
    seed: int = 0,
    state: PowerState | None = None,
) -> Generator[PowerState, None, float]:
    """Return max |μ| over the eigenvalues, by power iteration from a random start: a lower bound that rises with each step."""
    if state is None:
        start = torch.from_numpy(normals(derive_key(seed, "power"), 0, operator.size))[:, None]
        state = PowerState(0, start / start.norm(), 0.0, False)
    while not state.settled and state.iteration < max_iterations:
        product = applied(operator, state.vector, ids)
        value = float(product.norm())
        settled = abs(value - state.value) <= tolerance * value
        state = PowerState(state.iteration + 1, product / value if value else state.vector, value, settled)
        yield state
    return state.value


@dataclass(frozen=True)
class CgState:
    iteration: int
    x: Tensor  # (size, k)
    residual: Tensor  # (size, k), target − Ax by recurrence
    direction: Tensor  # (size, k)
    square: Tensor  # [k], ‖residual‖²
    target: Tensor  # (size, k), what A x is to equal


def conjugate_gradient(
    operator: Operator,
    b: Tensor,  # (size, k)
    damping: float,  # λ
    largest: float,  # λ_max
    tolerance: float = 1e-6,  # of ‖b − (H + λI)x‖/‖b‖
    max_iterations: int = 200,
    state: CgState | None = None,
) -> Generator[CgState, None, Solution]:
    """Return x with (H + λI) x = b, each column with its own steps. One product a step.

    Raises FloatingPointError for a direction p with pᵀ(H + λI)p ≤ 0: the matrix is not positive definite.
    """
    b = right_hand_side(operator, b, damping)

    def product(p: Tensor) -> Tensor:
        return applied(operator, p) + damping * p

    state = state or CgState(0, torch.zeros_like(b), b, b, squares(b), b)
    state = yield from _descend(product, state, tolerance, max_iterations, damping, largest)
    left = relative(b - product(state.x), b)
    return solution(state.x, b, left, tolerance, state.iteration, damping, largest)


def squared_gradient(
    operator: Operator,
    b: Tensor,  # (size, k)
    damping: float,  # λ
    largest: float,  # λ_max
    tolerance: float = 1e-6,  # of ‖Hb − (H² + λI)x‖/‖Hb‖
    max_iterations: int = 200,
    state: CgState | None = None,
) -> Generator[CgState, None, Solution]:
    """Return x with (H² + λI) x = Hb; H may be indefinite. Two products a step.

    Products in float32 lose what lies far below λ_max: the residual says so, and a λ near 1e-8 λ_max² needs float64.
    """
    b = right_hand_side(operator, b, damping)

    def product(p: Tensor) -> Tensor:
        return applied(operator, applied(operator, p)) + damping * p

    if state is None:
        target = applied(operator, b)
        state = CgState(0, torch.zeros_like(b), target, target, squares(target), target)
    state = yield from _descend(product, state, tolerance, max_iterations, damping, largest**2)
    left = relative(state.target - product(state.x), state.target)
    return solution(state.x, b, left, tolerance, state.iteration, damping, largest)


def _descend(
    product: Callable[[Tensor], Tensor], state: CgState, tolerance: float, max_iterations: int,
    damping: float, largest: float,
) -> Generator[CgState, None, CgState]:  # fmt: skip
    """Conjugate gradients (Hestenes & Stiefel 1952) for A x = target. Columns that are there cost no more products."""
    first = squares(state.target)
    while state.iteration < max_iterations and (active := state.square > tolerance**2 * first).any():
        p, square = state.direction[:, active], state.square[active]
        q = product(p)
        curvature = (p * q).sum(0)
        _refuse_negative(curvature / squares(p), state.iteration, damping, largest)
        alpha = square / curvature
        x = _changed(state.x, active, state.x[:, active] + alpha * p)
        residual = _changed(state.residual, active, state.residual[:, active] - alpha * q)
        after = squares(residual)
        direction = _changed(state.direction, active, residual[:, active] + after[active] / square * p)
        state = CgState(state.iteration + 1, x, residual, direction, after, state.target)
        _refuse_unbounded(after, first, state.iteration, damping, largest)
        yield state
    return state


def _refuse_negative(quotients: Tensor, iteration: int, damping: float, largest: float) -> None:
    """Raise FloatingPointError if pᵀAp/pᵀp is not above 0 for every column."""
    if (quotients <= 0).any():
        lowest = float(quotients.min())
        raise FloatingPointError(
            f"negative curvature at iteration {iteration}: pᵀAp/pᵀp = {lowest:.3g} with damping {damping:.3g} and largest "
            f"eigenvalue {largest:.3g}. Raise the damping above {damping - lowest:.3g}, use Gauss-Newton curvature, or "
            f"squared CG in float64."
        )


def _refuse_unbounded(square: Tensor, first: Tensor, iteration: int, damping: float, largest: float) -> None:
    """Apply the bound of conjugate gradients' residuals, √κ times the first: rounding has taken over beyond it."""
    if damping > 0:
        limit = (first * (largest / damping + 1)).sqrt()
        setting = f"damping {damping:.3g}, largest eigenvalue {largest:.3g}"
        refuse_growth("CG", square.sqrt(), limit, iteration, setting, "a larger damping, or curvature in float64")


FILTERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "inverse": lambda mu, damping: 1 / (mu + damping),
    "squared": lambda mu, damping: mu / (mu.square() + damping),
}


@dataclass(frozen=True)
class ExactState:
    matrix: Tensor  # (size, columns made so far)


def exact(
    operator: Operator,
    b: Tensor,  # (size, k)
    damping: float,  # λ
    kind: str = "inverse",  # a key of FILTERS: 1/(μ + λ) or μ/(μ² + λ)
    columns: int = 64,  # made at a time
    state: ExactState | None = None,
) -> Generator[ExactState, None, Solution]:
    """Return the solution by the whole matrix and its eigenvectors. Cost: size products, size³; ValueError above 16,384."""
    b = right_hand_side(operator, b, damping)
    if operator.size > MAX_EXACT:
        raise ValueError(
            f"an exact solve takes at most {MAX_EXACT} weights, here {operator.size}. Use cg, or fewer modules."
        )
    state = state or ExactState(b.new_zeros(operator.size, 0))
    while (done := state.matrix.shape[1]) < operator.size:
        width = min(columns, operator.size - done)
        unit = torch.zeros(operator.size, width, dtype=torch.float64)
        unit[done + torch.arange(width), torch.arange(width)] = 1
        state = ExactState(torch.cat([state.matrix, applied(operator, unit)], 1))
        yield state
    matrix = (state.matrix + state.matrix.T) / 2
    mu, vectors = torch.linalg.eigh(matrix)
    x = vectors @ (FILTERS[kind](mu, damping)[:, None] * (vectors.T @ b))
    largest = float(mu.abs().max())
    if not torch.isfinite(x).all() or (kind == "inverse" and float((mu + damping).abs().min()) <= 1e-13 * largest):
        raise FloatingPointError(
            f"H + λI is singular with λ = {damping:.3g}, λ_max = {largest:.3g}: raise the damping."
        )
    target, system = (b, matrix @ x) if kind == "inverse" else (matrix @ b, matrix @ (matrix @ x))
    left = relative(target - system - damping * x, target)
    return solution(x, b, left, 1e-6, operator.size, damping, largest)


def squared_residual(operator: Operator, x: Tensor, b: Tensor, damping: float) -> Tensor:
    """Return ‖Hb − (H² + λI)x‖ / ‖Hb‖, [k]."""
    target = applied(operator, b)
    return relative(target - applied(operator, applied(operator, x)) - damping * x, target)


def solution(
    x: Tensor, b: Tensor, residual: Tensor, tolerance: float, iterations: int, damping: float, largest: float,
    standard_error: Tensor | None = None,
) -> Solution:  # fmt: skip
    """Return the solution with its figures; a residual a little above the recurrence's is still converged."""
    cosine = (x * b).sum(0) / (x.norm(dim=0) * b.norm(dim=0)).clamp(min=torch.finfo(torch.float64).tiny)
    return Solution(x, residual, residual <= 2 * tolerance, iterations, damping, largest, cosine, standard_error)


def right_hand_side(operator: Operator, b: Tensor, damping: float) -> Tensor:
    """Return b as it is, checked. Raises ValueError for another shape or dtype, non-finite numbers, or damping below 0."""
    if damping < 0:
        raise ValueError(f"damping={damping} is not allowed: at least 0")
    if b.shape[0] != operator.size or b.dim() != 2 or b.dtype != torch.float64 or not torch.isfinite(b).all():
        raise ValueError(f"right-hand side {tuple(b.shape)} {b.dtype}: needs finite ({operator.size}, k) torch.float64")
    return b.contiguous()


def applied(operator: Operator, block: Tensor, ids: Tensor | None = None) -> Tensor:
    """Return curvature × block. Raises FloatingPointError if it is not finite."""
    product = operator.apply(block.contiguous(), ids).contiguous()
    if not all_finite(product):
        raise FloatingPointError(
            f"a curvature product is not finite, of a block with largest entry "
            f"{float(block.abs().max()):.3g}: use a wider curvature dtype, or look for examples with an infinite loss."
        )
    return product


def squares(block: Tensor) -> Tensor:
    """Return [k]: the columns' squared lengths."""
    return block.square().sum(0)


def relative(left: Tensor, target: Tensor) -> Tensor:
    """Return [k]: ‖left‖/‖target‖ per column, 0 where both vanish."""
    return left.norm(dim=0) / target.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)


def refuse_growth(solver: str, length: Tensor, limit: Tensor, iteration: int, setting: str, remedy: str) -> None:
    """Raise FloatingPointError if a column is 10 times longer than exact arithmetic allows, or not finite."""
    if not (length <= 10 * limit).all():
        worst = int((length / limit).argmax())
        raise FloatingPointError(
            f"{solver} diverges at iteration {iteration}: length {float(length[worst]):.3g} in column {worst}, at most "
            f"{float(limit[worst]):.3g} is possible, with {setting}. Try {remedy}."
        )


def _changed(block: Tensor, active: Tensor, columns: Tensor) -> Tensor:
    """Return a copy of the block with the active columns replaced."""
    out = block.clone()
    out[:, active] = columns
    return out
