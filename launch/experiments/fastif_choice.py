"""MiniLM's damping and LiSSA's settings, chosen on dev reviews before a test review is looked at.

λ is the largest of those offered at which the curvature still matters: where the scores of the plain gradients and the
exact ones are clearly apart. Then depth and repetitions are the cheapest whose scores rank as the exact ones do. Both are
judged on the rows of the curvature, in whose span everything is known (fastif_span.py).
"""

import itertools
import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from engine.solvers import finish
from engine.stochastic_solvers import Lissa, lissa_repetition
from launch.experiments import fastif_minilm as minilm
from launch.experiments import fastif_span as span
from launch.experiments.fastif_guard import pearson
from launch.experiments.fastif_head import right_and_wrong
from launch.experiments.kept import kept
from launch.experiments.subjects import logits_of

ALIKE, ENOUGH = 0.95, 0.97  # stricter than the guard and the gates, which are judged on other queries


def choose(config: dict[str, Any]) -> dict[str, float]:
    """Return the relative damping, depth and repetitions of a config, with what they reach on its dev queries."""
    names = ("minilm", "curvature_rows", "dampings", "depths", "repetitions", "dev_queries", "seed")
    return _chosen(json.dumps({name: config[name] for name in names}, sort_keys=True))


@lru_cache(maxsize=1)
def _chosen(config: str) -> dict[str, float]:
    given = json.loads(config)
    found = kept("choice", given, lambda: {k: torch.tensor(v, dtype=torch.float64) for k, v in search(given).items()})
    return {name: float(value) for name, value in found.items()}


def search(config: dict[str, Any]) -> dict[str, float]:
    """Look at every damping, then at every depth and repetitions in order of their product."""
    subject = minilm.trained(config["minilm"])
    exact = minilm.reference(config["minilm"], config["curvature_rows"])
    dev = subject.subject.parts["dev"]
    queries = dev.take(right_and_wrong(minilm.is_right(subject, dev), config["dev_queries"]))
    asked = minilm.query_gradients(subject, queries)
    scale = span.batch_scale(exact.gram, 1, config["seed"])
    inner, sign = span.span_of(exact, asked, scale), residuals(subject, exact)[:, None]
    identity = sign * span.margins(inner, inner.start())
    for relative in sorted(config["dampings"], reverse=True):
        damping = relative * exact.largest
        full = sign * span.margins(inner, span.exact_in_span(inner, damping))
        alike = float(np.mean(pearson(identity, full)))
        if alike <= ALIKE:
            break
    runs = trajectories(inner, Lissa(damping, scale, max(config["depths"]), 1, max(config["repetitions"]), config["seed"]),
                        config["depths"], exact.largest)  # fmt: skip
    for depth, count in sorted(
        itertools.product(config["depths"], config["repetitions"]), key=lambda one: one[0] * one[1]
    ):
        fast = sign * span.margins(inner, runs[depth][:count].mean(0))
        ranks = [stats.spearmanr(a, b).statistic for a, b in zip(fast.T, full.T, strict=True)]
        if np.mean(ranks) >= ENOUGH:
            break
    return {
        "damping": relative,
        "depth": depth,
        "repetitions": count,
        "alike": alike,
        "spearman": float(np.mean(ranks)),
    }


def trajectories(inner: span.Span, settings: Lissa, depths: list[int], largest: float) -> dict[int, Tensor]:
    """Return by depth x_J/s of every repetition, [T, 1 + n, k]."""
    found: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    ids = torch.arange(len(inner.gram))
    for repetition in range(settings.repetitions):

        def keep(state: Any) -> None:
            if state.iteration in found:
                found[state.iteration].append(state.x / settings.scale)

        finish(lissa_repetition(inner, inner.start(), ids, settings, repetition, largest), keep)
    return {depth: torch.stack(states) for depth, states in found.items()}


def residuals(subject: minilm.MiniLM, exact: minilm.Reference) -> Tensor:
    """Return what turns a row of A into the row's loss gradient: (p − y)/√(p(1 − p)), [n]."""
    out = logits_of(subject.model, exact.rows).double()
    p = torch.sigmoid(out[:, 1] - out[:, 0])
    return (p - exact.rows.labels) / (p * (1 - p)).sqrt()
