"""Training that keeps its checkpoints, and TracIn over them in memory: the engine's own passes without a run on disk."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.checkpoint_choice import choose_checkpoints
from engine.gradient_batch import GradientBatch
from engine.gradients import PerExampleGradients
from engine.methods.contract import QueryState, Rows, ScoreBlock, join_batches
from engine.methods.tracin import TracIn
from engine.parameters import select_parameters
from engine.projection import Projection
from engine.projectors import Dense, Projector, Whole, make_projector
from engine.training import TrainSettings, train
from launch.experiments.subjects import Part, State, Subject, loss, mean_loss

QUERY_ROWS = 64  # of a batch of queries


def states_of(subject: Subject, part: Part, settings: dict[str, Any], seed: int) -> list[State]:
    """Train a fresh model, by plain SGD unless the settings say otherwise; return its weights at each of their checkpoints."""
    torch.manual_seed(seed)
    model = subject.build()

    def collate(rows: list[int]) -> Batch:
        return part.batch(torch.tensor(rows))

    rows = list(range(len(part.labels)))
    steps = train(model, loss, collate, rows, TrainSettings(**{"optimizer": "sgd"} | settings, seed=seed))
    return [{n: w.detach().clone() for n, w in model.state_dict().items()} for step in steps if step.checkpoint]


def chosen_states(subject: Subject, states: list[State], part: Part, count: int) -> list[int]:
    """Return the positions of the checkpoints that TracIn sums over: all if there are no more than count.

    Of more, those that the rule chooses by the mean training loss at each of them.
    """
    if len(states) <= count:
        return list(range(len(states)))
    verdicts = choose_checkpoints([mean_loss(subject.load(state), part) for state in states], count)
    return [i for i, verdict in enumerate(verdicts) if verdict.kept]


class LocalSource:
    """One checkpoint in memory, as a method's `prepare` sees it."""

    def __init__(self, network: nn.Module, hooks: PerExampleGradients, learning_rate: float | None) -> None:
        self._network, self._hooks = network, hooks
        self.learning_rate = learning_rate
        self.layout = hooks.projector.layout
        self.parameters = tuple(p.name for p in hooks.parameters)

    def model(self) -> nn.Module:
        return self._network

    def gradients(self, batch: Batch) -> GradientBatch:
        return self._hooks(loss, batch)


def projector_of(model: nn.Module, projection: Projection) -> Projector:
    return make_projector(select_parameters(model, ["*"]), projection, torch.device("cpu"), torch.float32)


def query_state(model: nn.Module, rate: float, queries: Part, projector: Projector) -> QueryState:
    """Return TracIn's prepared queries under one checkpoint, in the part's order."""
    batches = [queries.batch(rows) for rows in torch.arange(len(queries.labels)).split(QUERY_ROWS)]
    with PerExampleGradients(model, select_parameters(model, ["*"]), projector, norms=True) as hooks:
        return TracIn().prepare(batches, LocalSource(model, hooks, rate))


def gradient_rows(model: nn.Module, part: Part, projector: Projector) -> tuple[Rows, Tensor]:
    """Return gradient rows with exact norms, and losses float64 [n], under one checkpoint, in the part's order."""
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, projector, norms=True) as gradients:
        parts = [gradients(loss, batch) for batch in part.batches()]
    arrays, norms, losses = join_batches(parts)
    ids = torch.cat([p.ids for p in parts])
    order = ids.argsort()
    assert norms is not None
    ordered = {name: array[order] for name, array in arrays.items()}
    return Rows(ids[order], ordered, norms[order], tuple(p.name for p in parameters)), losses[order]


def exact_block(model: nn.Module, rate: float, train: Part, queries: Part) -> tuple[ScoreBlock, QueryState]:
    """Return one checkpoint's unprojected block: every gradient is multiplied with the queries' and dropped."""
    state = query_state(model, rate, queries, Whole(select_parameters(model, ["*"]), stored=False))
    rows, _ = gradient_rows(model, train, Dense(state.arrays))
    products = Rows(rows.ids, {}, rows.norms, rows.parameters, rows.arrays["rows"])
    return TracIn().score(products, state), state


def exact_scores(models: Sequence[nn.Module], rate: float, train: Part, queries: Part) -> np.ndarray:
    """Return TracInCP without projection, Σ η ∇·∇′ over the checkpoints, float64 [n, Q]."""
    total = np.zeros((len(train.labels), len(queries.labels)))
    for model in models:
        block, state = exact_block(model, rate, train, queries)
        total += state.weight * block.scores.double().numpy()
    return total


def self_influence(rows: Rows) -> np.ndarray:
    """Return ‖∇‖² of every row as TracIn itself gives it beside its scores (of no query here)."""
    nothing = {name: array[:0] for name, array in rows.arrays.items()}
    state = QueryState(nothing, None, torch.zeros(0, dtype=torch.float64), 1.0, tuple(range(len(rows.parameters))))
    squares = TracIn().score(rows, state).self_influence
    assert squares is not None
    return squares.numpy()
