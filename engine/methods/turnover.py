"""Turn-over dropout as a method: L(f^m̃(z), q) − L(f^m(z), q) of a network trained under instance masks, forward alone.

Equation 2 of Kobayashi et al. 2020; its sign is the engine's: positive, the sub-network that never saw z does worse on q,
so z is a proponent. A checkpoint for each of R mask seeds, each a training of its own: the score is their mean. The
masked losses are made on the workers (actors/turnover.py, by engine/turnover_scores.py).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from engine.batches import Batch
from engine.masks import Side
from engine.methods.contract import ForwardSource, QueryState, Rows, ScoreBlock


@dataclass(frozen=True)
class TurnOverDropout:
    """Loss of the query in the sub-network that never saw the example, less that in the one that learned it."""

    against: Literal["own", "full"] = "own"  # L(f^m, q); full: of the network without masks, at half the cost
    reads: ClassVar[str] = "ids"
    score_unit: ClassVar[str] = "sub_network_loss"  # a difference of two losses of one network; not an infinitesimal
    online: ClassVar[bool] = False
    weighs_by_learning_rate: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False
    averages: ClassVar[bool] = True

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return under which masks of every training example the queries are run."""
        return ("own", "flipped") if self.against == "own" else ("flipped",)

    def checkpoints(self, count: int) -> list[int]:
        """Return the positions of the checkpoints that take part: all, one of every training."""
        return list(range(count))

    def prepare(self, queries: list[Batch], source: ForwardSource) -> QueryState:
        losses = torch.cat([source.losses(batch) for batch in queries])
        return QueryState({}, None, losses, 1.0, ())

    def score(self, rows: Rows, state: QueryState) -> ScoreBlock:
        """`rows.arrays`: the queries' losses under each side of the examples' masks, and the examples' own under both."""
        arrays = rows.arrays
        base = arrays["own"] if self.against == "own" else state.losses
        own = arrays["example"]
        return ScoreBlock(arrays["flipped"] - base, own[:, 1] - own[:, 0])

    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float:
        raise ValueError("method turnover has no vectors that a neighbour index could hold")
