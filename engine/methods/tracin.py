"""TracIn (Pruthi et al. 2020) and the gradient similarities of one checkpoint.

TracInCP, section 3.3 and appendix D:   score(z, z') = Σ_i η_i ∇ℓ(w_i, z) · ∇ℓ(w_i, z')
over checkpoints i, the products taken before the sum, never after. Positive: z is a proponent, it lowered the loss of z'.
Self-influence is score(z, z), from exact norms and never from a projection, whose error there is largest.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.batches import Batch
from engine.methods.contract import QueryState, Rows, ScoreBlock, Source, join_batches
from engine.parameters import matches
from engine.projection import RowLayout


@dataclass(frozen=True)
class TracIn:
    """Σ η ∇·∇′ over all checkpoints; `modules` narrows it to some layers (`classifier*`: last-layer TracIn)."""

    modules: tuple[str, ...] = ("*",)
    reads: ClassVar[str] = "gradients"
    score_unit: ClassVar[str] = "loss_change"  # predicted fall of the query's loss, per step of SGD on the example
    online: ClassVar[bool] = True
    weighs_by_learning_rate: ClassVar[bool] = True
    needs_norms: ClassVar[bool] = False

    def checkpoints(self, count: int) -> list[int]:
        """Return the positions of the checkpoints that take part: all."""
        return list(range(count))

    def prepare(self, queries: list[Batch], source: Source) -> QueryState:
        if source.learning_rate is None:
            raise ValueError("TracIn weighs every checkpoint by its learning rate: set checkpoints.learning_rate")
        return query_gradients(queries, source, self.modules, source.learning_rate)

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        return ScoreBlock(rows.dot(state.arrays), squared_norms(rows.norms, state))

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        return state.weight**0.5


@dataclass(frozen=True)
class GradientDot:
    """∇·∇′ at one checkpoint, the last unless said otherwise."""

    modules: tuple[str, ...] = ("*",)
    checkpoint: int = -1  # position in the list of checkpoints
    reads: ClassVar[str] = "gradients"
    score_unit: ClassVar[str] = "dot"
    online: ClassVar[bool] = True
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False

    def checkpoints(self, count: int) -> list[int]:
        return one_checkpoint(self.checkpoint, count)

    def prepare(self, queries: list[Batch], source: Source) -> QueryState:
        return query_gradients(queries, source, self.modules, 1.0)

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        return ScoreBlock(rows.dot(state.arrays), squared_norms(rows.norms, state))

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        return 1.0


@dataclass(frozen=True)
class GradientCosine:
    """∇·∇′ / (‖∇‖ ‖∇′‖) at one checkpoint, with exact norms. Blind to how unusual an example is: no label-noise detector."""

    modules: tuple[str, ...] = ("*",)
    checkpoint: int = -1
    reads: ClassVar[str] = "gradients"
    score_unit: ClassVar[str] = "cosine"
    online: ClassVar[bool] = True
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = True

    def checkpoints(self, count: int) -> list[int]:
        return one_checkpoint(self.checkpoint, count)

    def prepare(self, queries: list[Batch], source: Source) -> QueryState:
        return query_gradients(queries, source, self.modules, 1.0)

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        own, other = squared_norms(rows.norms, state), squared_norms(state.norms, state)
        assert own is not None
        assert other is not None
        scale = torch.outer(own.sqrt(), other.sqrt())
        dots = rows.dot(state.arrays)
        return ScoreBlock(
            torch.where(scale > 0, dots / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0).to(dots.dtype), own
        )

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        own = squared_norms(norms, state)
        assert own is not None
        return torch.where(own > 0, own.rsqrt(), 0.0)[:, None]


def one_checkpoint(position: int, count: int) -> list[int]:
    if not -count <= position < count:
        raise ValueError(
            f"method.checkpoint={position} is not there: {count} checkpoints, 0 to {count - 1} or −1 for the last"
        )
    return [position % count]


def squared_norms(norms: Tensor | None, state: QueryState) -> Tensor | None:
    """Return [n] float64: ‖∇‖² over the parameters that count, from the norms of each."""
    return None if norms is None else norms[:, list(state.chosen)].double().square().sum(1)


def query_gradients(queries: list[Batch], source: Source, modules: tuple[str, ...], weight: float) -> QueryState:
    """Return the queries' gradient rows, zero in the columns that `modules` leaves out."""
    parts = [source.gradients(batch) for batch in queries]
    arrays, norms, losses = join_batches(parts)
    chosen = choose(source.parameters, modules)
    if len(chosen) < len(source.parameters):
        names = {source.parameters[i] for i in chosen}
        arrays = {name: array * _mask(source.layout, name, array, names) for name, array in arrays.items()}
    return QueryState(arrays, norms, losses, weight, chosen)


def choose(parameters: tuple[str, ...], modules: tuple[str, ...]) -> tuple[int, ...]:
    """Return the positions of the parameters that one of the globs matches. Raises ValueError if none does."""
    chosen = tuple(i for i, p in enumerate(parameters) if any(matches(p, pattern) for pattern in modules))
    if not chosen:
        raise ValueError(
            f"method.modules={list(modules)} matches none of the stored parameters, such as {parameters[-1]}"
        )
    return chosen


def _mask(layout: RowLayout, name: str, array: Tensor, chosen: set[str]) -> Tensor:
    if any(r.parameter == "*" for r in layout.ranges):
        raise ValueError("method.modules cannot choose within a dense projection: it mixes all of them. Use two-sided.")
    keep = torch.zeros(array.shape[1], dtype=array.dtype)
    for r in layout.ranges:
        if r.array == name and r.parameter in chosen:
            keep[r.start : r.stop] = 1
    return keep
