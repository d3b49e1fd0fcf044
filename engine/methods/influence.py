"""Influence functions (Koh & Liang 2017): ∇ℓ(q)ᵀ (C + λI)⁻¹ ∇ℓ(z) / n at one checkpoint.

The papers' I(z, q) is −∇ℓ(q)ᵀ C⁻¹ ∇ℓ(z), the slope for weighing z up; leaving z out is a step of −1/n, hence −I/n here.
Positive: z is a proponent, the query's loss would rise without it. `prepare` takes the queries' whole gradients; the stage
after it multiplies them with the inverse curvature (actors/solve.py) and gives the state its weight 1/n.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from engine.batches import Batch
from engine.methods.contract import QueryState, Rows, ScoreBlock, Source
from engine.methods.inverse import InverseCurvature, one_damping
from engine.methods.tracin import one_checkpoint, query_gradients
from engine.solvers import CURVATURE

Positive = Annotated[float, Gt(0)]
Part = Annotated[float, Gt(0), Lt(1)]
Count = Annotated[int, Ge(1)]
Kind = Literal["gauss-newton", "hessian"]
Solver = Literal["cg", "squared-cg", "exact", "lissa", "sketch", "projected"]


@dataclass(frozen=True)
class Influence:
    """How the query's loss would change if the model were trained without the example, to first order."""

    solver: Solver = "cg"  # projected: on stored rows; it and sketch answer new queries at once
    damping: Positive | None = (
        None  # λ/λ_max: cg 0.01, lissa 0.1; /λ_max²: squared-cg 1e-4, sketch 0.01; projected: 0.1
    )
    damping_absolute: Positive | None = None  # λ itself, in its place; the papers' d·s: FastIF on MNLI 5e-3 · 1e4 = 50
    curvature: Kind | None = None  # default: hessian for squared-cg and sketch, else gauss-newton (projected: always)
    rows: Count | None = None  # training examples that estimate the curvature; default all
    tolerance: Part = 1e-5  # relative residual at which cg and squared-cg stop
    max_iterations: Count = 200  # of cg and squared-cg
    query_block: Count = 16  # queries (sketch: columns) solved together: time per query falls, memory rises
    l2: Annotated[float, Ge(0)] = 0.0  # of ½ l2 ‖θ‖² in the training objective
    dtype: Literal["float32", "float64"] = "float32"  # of curvature products; squared-cg below λ 1e-6 needs float64
    depth: Count = 1000  # iterations of lissa (J) and of sketch
    batch_size: Count | None = None  # their examples an iteration, B; default 1 for lissa, 32 for sketch
    repetitions: Count = 4  # LiSSA's independent runs T, whose mean is taken
    lissa_scale: Positive | None = None  # LiSSA's s; default: from λ_max of random batches
    columns: Count = 256  # of sketch, d: its error falls with √d, its store and time grow with d
    checkpoint: int = -1  # position in the list of checkpoints
    reads: ClassVar[str] = "gradients"
    score_unit: ClassVar[str] = "per_example_loo"
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_damping(self.damping, self.damping_absolute)

    @property
    def online(self) -> bool:
        return self.solver in ("projected", "sketch")

    @property
    def inverse(self) -> InverseCurvature:
        return InverseCurvature(
            self.solver, self.curvature or CURVATURE.get(self.solver, "gauss-newton"), self.damping, self.rows,
            self.tolerance, self.max_iterations, self.query_block, self.l2, self.dtype, self.depth, self.batch_size,
            self.repetitions, self.lissa_scale, self.columns, self.damping_absolute,
        )  # fmt: skip

    def checkpoints(self, count: int) -> list[int]:
        return one_checkpoint(self.checkpoint, count)

    def prepare(self, queries: list[Batch], source: Source) -> QueryState:
        return query_gradients(queries, source, ("*",), 1.0)

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        return ScoreBlock(rows.dot(state.arrays), None)

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        return state.weight**0.5
