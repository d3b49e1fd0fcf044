"""Which inverse curvature a method multiplies its prepared queries with, and by which solver it is found.

A method that needs one has the property `inverse` (contract.py); the stage between prepare and score reads it. λ is given
relative to the curvature's own size and is made absolute where that is known.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.curvature import Operator
from engine.solvers import CgState, ExactState, Solution, conjugate_gradient, exact, squared_gradient
from engine.stochastic_solvers import Lissa

DAMPING = {"cg": 0.01, "exact": 0.01, "squared-cg": 1e-4, "lissa": 0.1, "projected": 0.1}
STATES: dict[str, type] = {"cg": CgState, "squared-cg": CgState, "exact": ExactState}  # of what `start` returns


@dataclass(frozen=True)
class InverseCurvature:
    """(C + λI)⁻¹, or C(C² + λI)⁻¹ for squared-cg, with C the curvature of the mean training loss."""

    solver: str  # cg | squared-cg | exact | lissa | projected
    kind: str  # gauss-newton | hessian
    damping: float | None  # λ relative to λ_max, λ_max² (squared-cg) or the mean eigenvalue (projected); None: DAMPING
    rows: int | None = None  # training examples that estimate the curvature; None: all
    tolerance: float = 1e-5  # of the relative residual, where the solver takes one
    max_iterations: int = 200
    query_block: int = 16  # right-hand sides solved together
    l2: float = 0.0  # of ½ l2 ‖θ‖² in the training objective
    dtype: str = "float32"  # of the products
    depth: int = 1000  # LiSSA's iterations J
    batch_size: int = 1  # LiSSA's B
    repetitions: int = 4  # LiSSA's T
    scale: float | None = None  # LiSSA's s; None: from λ_max of random batches

    def absolute(self, size: float) -> float:
        """Return λ for a curvature of this size: its λ_max, or the mean eigenvalue where the solver is projected."""
        relative = DAMPING[self.solver] if self.damping is None else self.damping
        return relative * size ** (2 if self.solver == "squared-cg" else 1)

    def lissa(self, largest: float, scale: float, seed: int) -> Lissa:
        """Return LiSSA's settings for a curvature with this λ_max."""
        return Lissa(self.absolute(largest), scale, self.depth, self.batch_size, self.repetitions, seed)


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
