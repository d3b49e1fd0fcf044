"""Influence functions (Koh & Liang 2017): ∇ℓ(q)ᵀ (C + λI)⁻¹ ∇ℓ(z) / n at one checkpoint.

The papers' I(z, q) is −∇ℓ(q)ᵀ C⁻¹ ∇ℓ(z), the slope for weighing z up; leaving z out is a step of −1/n, hence −I/n here.
Positive: z is a proponent, the query's loss would rise without it. `prepare` takes the queries' whole gradients; the stage
after it multiplies them with the inverse curvature (actors/solve.py) and gives the state its weight 1/n.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from torch import Tensor

from engine.batches import Batch
from engine.methods.contract import QueryState, Rows, ScoreBlock, Source
from engine.methods.inverse import InverseCurvature
from engine.methods.tracin import one_checkpoint, query_gradients
from engine.solvers import CURVATURE

Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]
Kind = Literal["gauss-newton", "hessian"]


@dataclass(frozen=True)
class Influence:
    """How the query's loss would change if the model were trained without the example, to first order."""

    solver: Literal["cg", "squared-cg", "exact", "lissa", "projected"] = "cg"  # projected: on stored rows, online
    damping: Positive | None = (
        None  # λ/λ_max 0.01 (lissa 0.1), squared-cg λ/λ_max² 1e-4, projected λ/mean eigenvalue 0.1
    )
    curvature: Kind | None = None  # default: hessian for squared-cg, else gauss-newton; projected: always the latter
    rows: Count | None = None  # training examples that estimate the curvature; default all
    tolerance: Positive = 1e-5  # relative residual at which cg and squared-cg stop
    max_iterations: Count = 200  # of cg and squared-cg
    query_block: Count = 16  # queries solved together: time per query falls, memory rises
    l2: Annotated[float, Ge(0)] = 0.0  # of ½ l2 ‖θ‖² in the training objective
    dtype: Literal["float32", "float64"] = "float32"  # of curvature products; squared-cg below λ 1e-6 needs float64
    depth: Count = 1000  # LiSSA's iterations J
    batch_size: Count = 1  # LiSSA's examples an iteration, B
    repetitions: Count = 4  # LiSSA's independent runs T, whose mean is taken
    lissa_scale: Positive | None = None  # LiSSA's s; default: from λ_max of random batches
    checkpoint: int = -1  # position in the list of checkpoints
    reads: ClassVar[str] = "gradients"
    score_unit: ClassVar[str] = "per_example_loo"
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False

    @property
    def online(self) -> bool:
        return self.solver == "projected"

    @property
    def inverse(self) -> InverseCurvature:
        return InverseCurvature(
            self.solver, self.curvature or CURVATURE.get(self.solver, "gauss-newton"), self.damping, self.rows,
            self.tolerance, self.max_iterations, self.query_block, self.l2, self.dtype, self.depth, self.batch_size,
            self.repetitions, self.lissa_scale,
        )  # fmt: skip

    def checkpoints(self, count: int) -> list[int]:
        return one_checkpoint(self.checkpoint, count)

    def prepare(self, queries: list[Batch], source: Source) -> QueryState:
        return query_gradients(queries, source, ("*",), 1.0)

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        return ScoreBlock(rows.dot(state.arrays), None)

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        return state.weight**0.5
