"""FastIF's convex subject: a logistic head on MiniLM's sentence embeddings of movie reviews, at the minimum of its loss.

Everything about it has an exact answer: its curvature is one small matrix, and training again without some examples has
one result. Neighbours are sought among what the head is given.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.candidates import search_nearest
from engine.counters import derive_key, permutation
from engine.influence import per_example_loo
from engine.solvers import finish
from engine.stochastic_solvers import Lissa, batch_scale, lissa_repetition
from launch.experiments.heads import (
    Head,
    LogisticOperator,
    as_model,
    as_weights,
    features,
    fit,
    gradients,
    losses_of,
    newton,
    whole_matrix,
    with_one,
)
from launch.experiments.kept import kept
from launch.experiments.subjects import Part


@dataclass(frozen=True)
class ConvexSubject:
    """The head with what its influence is made of."""

    head: Head
    dev: Part
    matrix: Tensor  # its Gauss-Newton matrix, float64 [p, p], without the L2 term
    own: Tensor  # per-example gradients of the training loss, float64 [N, p]

    @property
    def largest(self) -> float:
        return float(torch.linalg.eigvalsh(self.matrix)[-1])

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return (C + λI)⁻¹ b, exactly. With λ = l2, the L2 term of the training loss, nothing is added to it."""
        return torch.linalg.solve(self.matrix + damping * torch.eye(len(self.matrix), dtype=torch.float64), b)

    def influence(self, solved: Tensor) -> Tensor:  # (p, Q)
        """Return the predicted effect of leaving each example out, [N, Q]."""
        return per_example_loo(self.own @ solved, len(self.own))


@lru_cache(maxsize=1)
def _subject(config: str) -> ConvexSubject:
    settings = json.loads(config)
    parts = sentence_embeddings({name: value for name, value in settings.items() if name != "l2"})
    head = Head(parts["train"], parts["test"], as_model(fit(parts["train"], settings["l2"])), settings["l2"])
    size = head.coordinates.size
    matrix = whole_matrix(LogisticOperator(head)) - head.l2 * torch.eye(size, dtype=torch.float64)
    return ConvexSubject(head, parts["dev"], matrix, gradients(head, head.train))


def sentence_embeddings(settings: dict[str, Any]) -> dict[str, Part]:
    """Return the reviews as MiniLM's sentence embeddings, float64 [n, 384] of length 1, which are kept."""

    def make() -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, part in features(settings).items():
            assert isinstance(part.inputs, Tensor)
            out |= {f"{name}.inputs": F.normalize(part.inputs), f"{name}.labels": part.labels}
        return out

    found = kept("embeddings", settings, make)
    return {name: Part(found[f"{name}.inputs"], found[f"{name}.labels"]) for name in settings["rows"]}


def convex(config: dict[str, Any]) -> ConvexSubject:
    """Return the subject of an experiment's `head` section, made once per process."""
    return _subject(json.dumps(config, sort_keys=True))


def asked_gradients(subject: ConvexSubject, queries: Part) -> Tensor:
    """Return ∇ℓ(q), (p, Q) float64."""
    return gradients(subject.head, queries).T.contiguous()


def fast_solution(subject: ConvexSubject, asked: Tensor, damping: float, given: dict[str, Any], seed: int) -> Tensor:
    """Return the mean of LiSSA's repetitions, (p, Q); `given`: depth, batch_size, repetitions."""
    curvature, ids = undamped(subject), torch.arange(len(subject.own))
    scale = batch_scale(curvature, ids, given["batch_size"], seed)
    settings = Lissa(damping, scale, given["depth"], given["batch_size"], given["repetitions"], seed)
    runs = (lissa_repetition(curvature, asked, ids, settings, t, subject.largest) for t in range(settings.repetitions))
    return torch.stack([finish(run) for run in runs]).mean(0)


def undamped(subject: ConvexSubject) -> LogisticOperator:
    """Return the head's curvature without its L2 term, which is the solvers' damping here."""
    return LogisticOperator(replace(subject.head, l2=0.0))


def embeddings(part: Part) -> np.ndarray:
    """Return what neighbours are sought by, float32 [n, H]."""
    assert isinstance(part.inputs, Tensor)
    return part.inputs.float().numpy()


def nearest(train: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of the training examples nearest by L2 distance, nearest first, int64 [Q, count]."""
    return search_nearest(iter([(np.arange(len(train)), train)]), queries, count)


def right_and_wrong(right: Tensor, count: int) -> Tensor:
    """Return the positions of the first count/2 predictions that are right, then of as many that are wrong."""
    return torch.cat([torch.nonzero(side).flatten()[: count // 2] for side in (right, ~right)])


def random_of_label(labels: Tensor, label: int, m: int, seed: int, query: int) -> Tensor:
    """Return m random examples of one label."""
    having = torch.nonzero(labels == label).flatten()
    return having[torch.from_numpy(permutation(derive_key(seed, f"random {label}", query), len(having))[:m].copy())]


def is_right(subject: ConvexSubject, part: Part) -> Tensor:
    return (with_one(part) @ as_weights(subject.head.model).T).argmax(1) == part.labels


def rises_without(subject: ConvexSubject, queries: Part, removed: list[Tensor]) -> Tensor:
    """Return how much each query's loss rises when the head is trained again without its own removed examples, [Q].

    The penalty keeps its weight against the sum of the losses: the mean is still taken over all N.
    """
    weights = as_weights(subject.head.model)
    kept = torch.ones(len(removed), len(subject.head.train.labels), dtype=torch.float64)
    for row, ids in enumerate(removed):
        kept[row, ids] = 0
    again = torch.cat([newton(subject.head.train, subject.head.l2, weights, rows) for rows in kept.split(8)])
    own = torch.arange(len(removed))
    return losses_of(queries, again)[own, own] - losses_of(queries, weights[None])[0]
