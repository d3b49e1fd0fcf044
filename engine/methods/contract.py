"""What an attribution method is: prepare(queries) → state, then score(rows, state) → block.

`prepare` runs once per checkpoint and sees the model through a Source. `score` runs on a worker for one shard under one
checkpoint and is pure. The score of a training example is the sum over checkpoints of state.weight · block; positive
means that training on the example lowered the query's loss.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.gradient_batch import GradientBatch
from engine.methods.inverse import InverseCurvature
from engine.methods.nearest import Nearest
from engine.models import import_path
from engine.projection import RowLayout

METHODS = {
    "tracin": "engine.methods.tracin:TracIn",
    "gradient-dot": "engine.methods.tracin:GradientDot",
    "gradient-cosine": "engine.methods.tracin:GradientCosine",
    "influence": "engine.methods.influence:Influence",
    "fastif": "engine.methods.fastif:FastIF",
    "turnover": "engine.methods.turnover:TurnOverDropout",
    "multistage": "engine.methods.multistage:MultiStage",
    "representer": "engine.methods.representer:Representer",
}


@dataclass(frozen=True)
class Rows:
    """n training examples under one checkpoint, as a method's score sees them."""

    ids: Tensor  # int64 [n]
    arrays: dict[str, Tensor]  # name -> [n, columns] gradient rows; empty where products are given instead
    norms: Tensor | None  # [n, parameters] exact gradient norms
    parameters: tuple[str, ...]  # names of the norm columns
    products: Tensor | None = None  # [n, Q] dot products with state.arrays, when no rows were kept

    def dot(self, arrays: dict[str, Tensor]) -> Tensor:
        """Return [n, Q]: the rows' dot products with the queries'."""
        if self.products is not None:
            return self.products
        total = None
        for name, queries in arrays.items():
            product = self.arrays[name].to(queries.dtype) @ queries.T
            total = product if total is None else total + product
        assert total is not None
        return total


@dataclass(frozen=True)
class QueryState:
    """What prepare made for one checkpoint: CPU tensors only, so that it can be saved and read by every worker."""

    arrays: dict[str, Tensor]  # name -> [Q, columns]
    norms: Tensor | None  # [Q, parameters]
    losses: Tensor  # float64 [Q]
    weight: float  # η of this checkpoint
    chosen: tuple[int, ...]  # norm columns that the score counts: all, or a method's choice among them
    candidates: Tensor | None = None  # int64 [Q, k], −1 where there are fewer: only these training ids are scored
    probes: Tensor | None = None  # int64 [Q, s], −1: other ids, scored besides to estimate what candidates miss

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tensors."""
        tensors = [*self.arrays.values(), self.norms, self.losses, self.candidates, self.probes]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of one shard under one checkpoint, not yet weighted, and the examples' own self-influence."""

    scores: Tensor  # [n, Q]
    self_influence: Tensor | None  # [n], None without exact norms


class Source(Protocol):
    """A checkpoint as a method sees it."""

    learning_rate: float | None
    parameters: tuple[str, ...]  # of the norm columns

    @property
    def layout(self) -> RowLayout: ...
    def model(self) -> nn.Module: ...
    def gradients(self, batch: Batch) -> GradientBatch: ...  # of the measurement


class ForwardSource(Protocol):
    """A checkpoint as a method sees it that takes no gradient."""

    def losses(self, batch: Batch) -> Tensor: ...  # the measurement, float64 [B]
    def features(self, batch: Batch) -> Tensor: ...  # what the last layer is given, float32 [B, H]
    def target(self, batch: Batch) -> Tensor: ...  # true classes, int64 [B]
    def head(self) -> Tensor: ...  # the last layer trained again for these scores, float64 (K, H)


class Method(Protocol):
    """An attribution method; its settings are its fields.

    One that scores along inverse-curvature products has the property `inverse` besides (inverse_of); one that
    scores some examples of each query alone, `nearest` (nearest_of); one whose score is the mean over checkpoints,
    `averages`.
    `scale` is what rows and queries are multiplied with, given their own norms, so that the weighted score is one inner
    product: what a neighbour index needs.
    """

    reads: str  # what score is given: "gradients" | "features" | "examples" | "ids"
    score_unit: str
    online: bool  # answers a new query in seconds from what is stored
    weighs_by_learning_rate: bool
    needs_norms: bool  # exact gradient norms of both sides

    def checkpoints(self, count: int) -> list[int]: ...
    def prepare(self, queries: list[Batch], source: Source) -> QueryState: ...
    def score(self, rows: Rows, state: QueryState) -> ScoreBlock: ...
    def scale(self, norms: Tensor | None, state: QueryState) -> Tensor | float: ...


def load_method(name: str, settings: dict) -> Method:
    """Return the named method with these settings. Raises ValueError naming what is known."""
    if name not in METHODS:
        raise ValueError(f"method.name={name!r} is not known: use one of {', '.join(METHODS)}")
    try:
        return import_path(METHODS[name])(**settings)
    except TypeError as error:
        raise ValueError(f"method {name} does not take these settings {sorted(settings)}: {error}") from error


def inverse_of(method: Method) -> InverseCurvature | None:
    """Return with which inverse curvature the method's prepared queries are multiplied; None for most methods."""
    return getattr(method, "inverse", None)


def nearest_of(method: Method) -> Nearest | None:
    """Return by which features the method's candidates are found; None for a method that scores every example."""
    return getattr(method, "nearest", None)


def averages(method: Method) -> bool:
    """Tell whether the score is the mean over checkpoints, with a standard error, in the place of their weighted sum."""
    return bool(getattr(method, "averages", False))


def join_batches(parts: list[GradientBatch]) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
    """Return arrays, norms and losses of several batches, one after the other, on the CPU."""
    arrays = {name: torch.cat([p.arrays[name].cpu() for p in parts]) for name in parts[0].arrays}
    norms = [p.norms.cpu() for p in parts if p.norms is not None]
    return arrays, torch.cat(norms) if norms else None, torch.cat([p.losses.cpu() for p in parts])
