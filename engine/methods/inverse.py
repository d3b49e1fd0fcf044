"""Which inverse curvature a method multiplies its prepared queries with, and by which solver it is found.

A method that needs one has the property `inverse` (contract.py); the stage between prepare and score reads it. λ is given
relative to the curvature's own size, and made absolute where that is known, or absolute as the papers give it.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.curvature import Operator
from engine.solvers import CgState, ExactState, Solution, conjugate_gradient, exact, squared_gradient
from engine.stochastic_solvers import Lissa, Sketch, sketch_step

DAMPING = {"cg": 0.01, "exact": 0.01, "squared-cg": 1e-4, "lissa": 0.1, "sketch": 0.01, "projected": 0.1}
BATCHES = {"lissa": 1, "sketch": 32}  # examples of a random batch
_OF_SQUARE = ("squared-cg", "sketch")  # solve with H² + λI
_DESCENTS, _DRAWN = ("cg", "squared-cg"), ("lissa", "sketch")
USED_BY = {  # settings that only some solvers read
    "tolerance": _DESCENTS, "max_iterations": _DESCENTS, "depth": _DRAWN, "batch_size": _DRAWN, "repetitions": ("lissa",),
    "lissa_scale": ("lissa",), "columns": ("sketch",),
}  # fmt: skip
STATES: dict[str, type] = {"cg": CgState, "squared-cg": CgState, "exact": ExactState}  # of what `start` returns


@dataclass(frozen=True)
class InverseCurvature:
    """(C + λI)⁻¹, or C(C² + λI)⁻¹ for squared-cg and sketch, with C the curvature of the mean training loss."""

    solver: str  # cg | squared-cg | exact | lissa | sketch | projected
    kind: str  # gauss-newton | hessian
    damping: float | None  # λ relative to λ_max, λ_max² (_OF_SQUARE) or the mean eigenvalue (projected); None: DAMPING
    rows: int | None = None  # training examples that estimate the curvature; None: all
    tolerance: float = 1e-5  # of the relative residual, where the solver takes one
    max_iterations: int = 200
    query_block: int = 16  # right-hand sides solved together
    l2: float | Tensor = 0.0  # of ½ l2 ‖θ‖² in the training objective; (size, 1): each weight has its own
    dtype: str = "float32"  # of the products
    depth: int = 1000  # iterations of lissa (J) and sketch
    batch_size: int | None = None  # their B; None: BATCHES
    repetitions: int = 4  # LiSSA's T
    scale: float | None = None  # LiSSA's s; None: from λ_max of random batches
    columns: int = 256  # of the sketch, d
    damping_absolute: float | None = None  # λ itself, in the place of `damping`

    @property
    def batch(self) -> int:
        """Return the examples of a random batch."""
        return BATCHES[self.solver] if self.batch_size is None else self.batch_size

    def absolute(self, size: float) -> float:
        """Return λ for a curvature of this size: its λ_max, or the mean eigenvalue where the solver is projected."""
        if self.damping_absolute is not None:
            return self.damping_absolute
        relative = DAMPING[self.solver] if self.damping is None else self.damping
        return relative * size ** (2 if self.solver in _OF_SQUARE else 1)

    def lissa(self, largest: float, scale: float, seed: int) -> Lissa:
        """Return LiSSA's settings for a curvature with this λ_max."""
        return Lissa(self.absolute(largest), scale, self.depth, self.batch, self.repetitions, seed)

    def sketch(self, largest: float, scale: float, seed: int) -> Sketch:
        """Return the sketch's settings for a curvature with this λ_max, whose batches' is `scale`."""
        damping = self.absolute(largest)
        step = sketch_step(scale, damping)
        return Sketch(damping, step, self.columns, self.query_block, self.depth, self.batch, seed)


def without_effect(solver: str, given: Iterable[str]) -> list[str]:
    """Return which of these settings the solver does not read."""
    return [name for name in given if solver not in USED_BY.get(name, (solver,))]


def one_damping(relative: float | None, absolute: float | None) -> None:
    """Raise ValueError if λ is given both ways."""
    if relative is not None and absolute is not None:
        raise ValueError(
            f"method.damping={relative} and method.damping_absolute={absolute} are not allowed together: the first is "
            f"relative to the curvature's size, the second is λ itself. Leave one out."
        )


def start(
    inverse: InverseCurvature,
    operator: Operator,
    b: Tensor,  # (size, k) float64
    largest: float,  # λ_max
    state: Any = None,  # one of STATES, to go on from
) -> Generator[Any, None, Solution]:
    """Return the running solver of one block of queries, for every solver that needs products alone."""
    damping = inverse.absolute(largest)
    if inverse.solver == "exact":
        return exact(operator, b, damping, state=state)
    descend = squared_gradient if inverse.solver == "squared-cg" else conjugate_gradient
    return descend(operator, b, damping, largest, inverse.tolerance, inverse.max_iterations, state)
