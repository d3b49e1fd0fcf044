"""FastIF (Guo et al. 2021): influence of the query's nearest training examples alone, by parallel LiSSA.

kNN over features → k candidates → LiSSA, its repetitions side by side → influence of the candidates; only they are read.
The papers' influence is negative for a helpful example; here as everywhere a proponent is positive, in units of leaving it
out. What the candidates miss is estimated: on some queries a random slice of the other examples is scored too.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from engine.batches import Batch
from engine.methods.contract import QueryState, Rows, ScoreBlock, Source
from engine.methods.influence import Count, Kind, Positive
from engine.methods.inverse import InverseCurvature, one_damping
from engine.methods.nearest import Nearest
from engine.methods.tracin import one_checkpoint, query_gradients


@dataclass(frozen=True)
class FastIF:
    """Influence of the k training examples nearest to the query, its inverse curvature by LiSSA."""

    neighbours: Count = 1000  # k, candidates of a query
    features: Literal["pooled", "last-hidden"] = "pooled"  # or the last layer's mean over tokens; a task's own go first
    anchors: bool = False  # one list of candidates for all queries: the nearest of their mean feature
    recall_sample: Count = 200  # other examples scored for each of a few queries, to estimate what is missed
    damping: Positive | None = None  # λ relative to λ_max; default 0.1
    damping_absolute: Positive | None = None  # λ itself, in its place; the paper's d·s: 5e-3 · 1e4 = 50 on MNLI
    curvature: Kind = "gauss-newton"
    rows: Count | None = None  # training examples that estimate the curvature; default all
    query_block: Count = 16  # queries solved together: time per query falls, memory rises
    l2: Annotated[float, Ge(0)] = 0.0  # of ½ l2 ‖θ‖² in the training objective
    dtype: Literal["float32", "float64"] = "float32"  # of curvature products
    depth: Count = 1000  # iterations J
    batch_size: Count = 1  # examples an iteration, B
    repetitions: Count = 4  # independent runs T, whose mean is taken
    lissa_scale: Positive | None = None  # s; default: from λ_max of random batches
    checkpoint: int = -1  # position in the list of checkpoints
    reads: ClassVar[str] = "gradients"
    score_unit: ClassVar[str] = "per_example_loo"
    online: ClassVar[bool] = False
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_damping(self.damping, self.damping_absolute)

    @property
    def inverse(self) -> InverseCurvature:
        return InverseCurvature(
            "lissa", self.curvature, self.damping, self.rows, query_block=self.query_block, l2=self.l2, dtype=self.dtype,
            depth=self.depth, batch_size=self.batch_size, repetitions=self.repetitions, scale=self.lissa_scale,
            damping_absolute=self.damping_absolute,
        )  # fmt: skip

    @property
    def nearest(self) -> Nearest:
        return Nearest(self.neighbours, self.features, self.anchors, self.recall_sample)

    def checkpoints(self, count: int) -> list[int]:
        return one_checkpoint(self.checkpoint, count)

    def prepare(self, queries: list[Batch], source: Source) -> QueryState:
        return query_gradients(queries, source, ("*",), 1.0)

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        return ScoreBlock(rows.dot(state.arrays), None)

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        return state.weight**0.5
