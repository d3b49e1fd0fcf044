"""influence.loo: do influence functions predict what leaving an example out does? (Koh & Liang 2017, section 4.2)

A logistic head on cached features, at the minimum of its loss. For the examples with the largest influence, and for others
drawn at random, the model is trained again without each, by Newton's method to the end, and the change of every query's
loss is held against g_qᵀ(H + λI)⁻¹g_z / n, divided by 1 − h_z. λ is the L2 term of the loss; nothing is added to it. Per
query: the correlation over the examples, and the slope of the true change on the predicted one, through the origin.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.counters import derive_key, permutation
from engine.influence import per_example_loo
from engine.metrics import bootstrap_interval
from engine.solvers import exact, finish
from launch.experiments.heads import (
    Head,
    as_weights,
    gradients,
    leverage,
    logistic,
    losses_of,
    operator,
    retrained_without,
    whole_matrix,
)
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

COLOURS = {"top": "#c8553d", "random": "#3d5a98"}


def cells(config: dict[str, Any]) -> list[str]:
    return ["head"]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Train, predict, leave out; return every query's agreement and what the head is like."""
    head = logistic(config)
    asked = head.queries.take(torch.arange(config["queries"]))
    predicted = scores(head, gradients(head, asked))
    chosen = chosen_examples(predicted, config["top"], config["random"], config["seed"])
    weights = as_weights(head.model)
    again = retrained_without(head.train, head.l2, weights, chosen.tolist())
    true = losses_of(asked, again) - losses_of(asked, weights[None])
    matrix = whole_matrix(operator(head))
    longer = 1 / (1 - leverage(head, matrix)[chosen])[:, None]
    first = predicted[chosen]
    groups = {"all": slice(None), "top": slice(config["top"]), "random": slice(config["top"], None)}
    mu = torch.linalg.eigvalsh(matrix)
    shown = slice(None, None, max(1, config["queries"] // config["drawn"]))
    return {
        "agreement": {name: agreement((longer * first)[rows], true[rows]) for name, rows in groups.items()},
        "uncorrected": agreement(first, true),
        "examples": chosen.tolist(),
        "largest_leverage": float(1 - 1 / longer.max()),
        "effective_dimension": float(((mu - head.l2) / mu).sum()),
        "parameters": len(mu),
        "damping": head.l2,
        "largest": float(mu.max()) - head.l2,
        "drawn": {"predicted": rounded((longer * first)[:, shown]), "true": rounded(true[:, shown])},
    }


def scores(head: Head, asked: Tensor) -> Tensor:  # [Q, p]
    """Return the predicted change of every query's loss without each training example, [n, Q]."""
    found = finish(exact(operator(head), asked.T.contiguous(), damping=0.0))  # λ, the loss's own, is in the curvature
    return per_example_loo(gradients(head, head.train) @ found.x, len(head.train.labels))


def chosen_examples(predicted: Tensor, top: int, random: int, seed: int) -> Tensor:
    """Return the ids of the examples with the largest influence on all queries together, then of others at random."""
    order = predicted.abs().sum(1).argsort(descending=True, stable=True)
    others = order[top:].sort().values
    return torch.cat([order[:top], others[permutation(derive_key(seed, "left out"), len(others))[:random]]])


def agreement(predicted: Tensor, true: Tensor) -> dict[str, list[float]]:
    """Return every query's correlations over the examples and its slope."""
    pairs = list(zip(predicted.T.numpy(), true.T.numpy(), strict=True))
    return {
        "pearson": [float(stats.pearsonr(p, t).statistic) for p, t in pairs],
        "spearman": [float(stats.spearmanr(p, t).statistic) for p, t in pairs],
        "slope": [float(p @ t / (p @ p)) for p, t in pairs],
    }


def rounded(numbers: Tensor) -> list[list[float]]:
    return [[float(f"{number:.5g}") for number in row] for row in numbers.tolist()]


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge correlation and slope over all examples, means and intervals over the queries; report the rest."""
    [found] = done.values()

    def mean(name: str, of: str, group: str = "all", threshold: float | None = None) -> Gate:
        values = np.array((found["agreement"] | {"uncorrected": found["uncorrected"]})[group][of])
        return Gate(name, float(values.mean()), bootstrap_interval(values), threshold)

    slope = mean("slope", "slope")
    return [
        mean("pearson", "pearson", threshold=0.98),
        slope,
        Gate("slope, distance from 1", abs(slope.value - 1), threshold=0.05, at_least=False),
        mean("spearman", "spearman"),
        *(mean(f"{of}, {group} examples", of, group) for group in COLOURS for of in ("pearson", "slope")),
        *(mean(f"{of}, without 1/(1 − h)", of, "uncorrected") for of in ("pearson", "slope")),
        *(Gate(name.replace("_", " "), found[name]) for name in ("effective_dimension", "damping", "largest")),
        Gate("largest leverage", found["largest_leverage"]),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw true against predicted changes of some queries' losses."""
    [found] = done.values()
    predicted, true = (np.array(found["drawn"][name]) * 1e3 for name in ("predicted", "true"))
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    ends = [predicted.min(), predicted.max()]
    axes.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
    for name, rows in (("random", slice(config["top"], None)), ("top", slice(config["top"]))):
        axes.plot(predicted[rows].ravel(), true[rows].ravel(), ".", color=COLOURS[name], markersize=4, alpha=0.6,
                  label=f"{len(predicted[rows])} {'with the largest influence' if name == 'top' else 'at random'}")  # fmt: skip
    title = f"{len(found['examples'])} examples left out, {predicted.shape[1]} queries"
    axes.set_title(f"{title}; the line: as predicted", loc="left", fontsize=10)
    axes.set(xlabel="predicted rise of the query's loss, 10⁻³", ylabel="after training again without it, 10⁻³")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, folder, "loo")


EXPERIMENT = Experiment(
    name="influence.loo",
    claim="Influence predicts what leaving an example out does: a logistic head on 5,000 movie reviews, trained again",
    minutes=6,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
