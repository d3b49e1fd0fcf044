"""Multi-stage influence (Chen et al. 2020) as a method: from a pretraining example to a fine-tuned model's prediction.

`prepare` takes the queries' gradients over (W, Θ) under the fine-tuned model; the stage after it (actors/multistage.py) leaves
s of every query over (W, U), in its two parts, after engine/multistage.py. The papers' I = s · ∇g(z) is the slope for
weighing z up, positive where z does harm; leaving z out is a step of −1/m, hence the weight −1/m here. Positive: z is a
proponent, without it the query's loss would rise.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from engine.batches import Batch
from engine.methods.contract import QueryState, Rows, ScoreBlock, Source
from engine.methods.inverse import InverseCurvature
from engine.methods.tracin import one_checkpoint, query_gradients
from engine.solvers import CURVATURE

Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class MultiStage:
    """How the query's loss would change if the model were pretrained without the example, to first order."""

    case: Literal["fixed", "updated"] = "fixed"  # whether fine-tuning left the shared weights W as they were
    alpha: Positive | None = None  # updated: of α ‖W − W̄‖²; default 1/(2ηT) by the checkpoint's log; the paper's 0.01
    asked: Literal["each", "sum"] = "each"  # sum: the queries' summed loss is asked about, as one query
    solver: Literal["cg", "squared-cg", "exact", "lissa"] = "cg"  # squared-cg: the paper's
    damping: Positive | None = None  # fine-tuning's λ/λ_max: cg 0.01, lissa 0.1; /λ_max²: squared-cg 1e-4
    damping_absolute: Positive | None = None  # λ itself, in its place; the paper's on MNIST 1e-8
    pretrain_damping: Positive | None = None  # pretraining's; default as above
    pretrain_damping_absolute: Positive | None = None  # λ itself; the paper's on MNIST 1e-2
    curvature: Literal["gauss-newton", "hessian"] | None = None  # default: hessian for squared-cg, else gauss-newton
    rows: Count | None = None  # fine-tuning examples that estimate its curvature; default all
    pretrain_rows: Count | None = None  # pretraining examples that estimate its; default all; the paper's 1000
    l2: Annotated[float, Ge(0)] = 0.0  # of ½ l2 ‖·‖² in the objective of fine-tuning
    pretrain_l2: Annotated[float, Ge(0)] = 0.0  # of ½ l2 ‖·‖² in the objective of pretraining
    tolerance: Annotated[float, Gt(0), Lt(1)] = 1e-5  # relative residual at which cg and squared-cg stop
    max_iterations: Count = 200  # of cg and squared-cg
    query_block: Count = 16  # right-hand sides solved together; there are two a query
    dtype: Literal["float32", "float64"] = "float32"  # of curvature products
    depth: Count = 1000  # LiSSA's iterations J
    batch_size: Count = 1  # LiSSA's examples an iteration, B
    repetitions: Count = 4  # LiSSA's independent runs T, whose mean is taken
    checkpoint: int = -1  # position in the list of fine-tuning's checkpoints; of pretraining's, the last
    reads: ClassVar[str] = "gradients"
    score_unit: ClassVar[str] = "per_example_loo"
    online: ClassVar[bool] = False
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.case == "fixed" and self.alpha is not None:
            raise ValueError(
                f"method.alpha={self.alpha} is not allowed with method.case=fixed, where W stays: leave it out, or set "
                f"method.case=updated."
            )
        for lead in ("", "pretrain_"):
            if getattr(self, f"{lead}damping") is not None and getattr(self, f"{lead}damping_absolute") is not None:
                raise ValueError(
                    f"method.{lead}damping and method.{lead}damping_absolute are not allowed together: the first is "
                    f"relative to the curvature's size, the second is λ itself. Leave one out."
                )

    @property
    def finetuning(self) -> InverseCurvature:
        return self._inverse(self.damping, self.damping_absolute, self.rows, self.l2)

    @property
    def pretraining(self) -> InverseCurvature:
        return self._inverse(
            self.pretrain_damping, self.pretrain_damping_absolute, self.pretrain_rows, self.pretrain_l2
        )

    def _inverse(self, damping: float | None, absolute: float | None, rows: int | None, l2: float) -> InverseCurvature:
        return InverseCurvature(
            self.solver, self.curvature or CURVATURE.get(self.solver, "gauss-newton"), damping, rows, self.tolerance,
            self.max_iterations, self.query_block, l2, self.dtype, self.depth, self.batch_size, self.repetitions,
            damping_absolute=absolute,
        )  # fmt: skip

    def checkpoints(self, count: int) -> list[int]:
        return one_checkpoint(self.checkpoint, count)

    def prepare(self, queries: list[Batch], source: Source) -> QueryState:
        return query_gradients(queries, source, ("*",), 1.0)

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        """Return the products with the parts of s, [n, 2Q]: of every query through Θ, then of every query through W."""
        return ScoreBlock(rows.dot(state.arrays), None)

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        raise ValueError("method multistage keeps no rows that a neighbour index could hold")
