"""multistage.ridge: where both stages have closed forms, is influence their slope, and the effect of leaving out?

Progression of diabetes, by ridge regression twice: pretraining on some patients, fine-tuning on others, whose weights of the
common measurements W stay (case 1) or are held by α ‖W − W̄‖² (case 2). The engine's adjoint with whole Hessians stands against
both stages solved again in NumPy, with one pretraining patient's weight moved by ±ε, and with the patient left out.
"""

import csv
import gzip
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

from engine.batches import Batch
from engine.coordinates import chosen_coordinates
from engine.counters import derive_key, permutation
from engine.curvature import Curvature, Examples, LocalOperator
from engine.multistage import fixed, proximal, shared_places, updated
from engine.solvers import exact, finish
from launch.experiments.multistage_plots import correlation, scatter
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import ROOT

NAMES = {"common.weight": "common.weight"}


class Linear(nn.Module):
    """Weights of the common measurements, and of a stage's own ones with an intercept."""

    def __init__(self, common: int, own: int) -> None:
        super().__init__()
        self.common, self.own = nn.Linear(common, 1, bias=False), nn.Linear(own, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        common = self.common.in_features
        return (self.common(x[:, :common]) + self.own(x[:, common:]))[:, 0]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square() / 2


@dataclass(frozen=True)
class Stage:
    """Rows with the common measurements first, and an intercept last."""

    x: np.ndarray  # [n, p]
    y: np.ndarray
    common: int

    def operator(self, weights: np.ndarray, names: list[str], l2: float | Tensor) -> LocalOperator:
        """Return the engine's Hessian over some weights."""
        batch = self.batch
        curvature = Curvature(self.model(weights), loss, chosen_coordinates(self.model(weights), names), "hessian",
                              torch.float64)  # fmt: skip
        return LocalOperator(curvature, Examples(batch.ids, [[batch]], lambda ids: [batch.take(ids.tolist())]), l2)

    def model(self, weights: np.ndarray) -> Linear:
        made = Linear(self.common, self.x.shape[1] - self.common).double()
        common, own = torch.from_numpy(weights.copy()).split([self.common, len(weights) - self.common])
        made.load_state_dict({"common.weight": common[None], "own.weight": own[None]})
        return made

    @property
    def batch(self) -> Batch:
        tensors = {"x": torch.from_numpy(self.x), "y": torch.from_numpy(self.y)}
        return Batch(torch.arange(len(self.y)), tensors)


@dataclass(frozen=True)
class Stages:
    """Pretraining, fine-tuning and the queries, and their closed forms."""

    first: Stage
    second: Stage
    queries: Stage
    l2: float

    def pretrained(self, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """Return (W̄, U) = argmin Σ weight ½(x·s − y)²/m + ½ l2 ‖s‖²."""
        x, y = self.first.x, self.first.y
        weighted = x.T * (weights / len(y))
        return np.linalg.solve(weighted @ x + self.l2 * np.eye(x.shape[1]), weighted @ y)

    def finetuned(self, w: np.ndarray, alpha: float) -> np.ndarray:
        """Return (W, Θ), α 0: with W as it is."""
        x, y, c = self.second.x, self.second.y, self.second.common
        matrix, right = x.T @ x / len(y) + self.l2 * np.eye(x.shape[1]), x.T @ y / len(y)
        if not alpha:
            return np.concatenate([w, np.linalg.solve(matrix[c:, c:], right[c:] - matrix[c:, :c] @ w)])
        matrix[:c, :c] += 2 * alpha * np.eye(c)
        right[:c] += 2 * alpha * w
        return np.linalg.solve(matrix, right)

    def answers(self, weights: np.ndarray | float, alpha: float) -> np.ndarray:
        """Return every query's loss after both stages, pretraining's examples weighed so."""
        after = self.finetuned(self.pretrained(weights)[: self.first.common], alpha)
        return (self.queries.x @ after - self.queries.y) ** 2 / 2

    def influence(self, alpha: float) -> np.ndarray:
        """Return I(z, q) by the engine, [m, Q]."""
        s = self.pretrained()
        after = self.finetuned(s[: self.first.common], alpha)
        ours, theirs = (chosen_coordinates(one.model(at), ["*"]) for one, at in ((self.first, s), (self.second, after)))
        shared = shared_places(ours, theirs, NAMES)
        f = torch.from_numpy(self.queries.x * (self.queries.x @ after - self.queries.y)[:, None]).T.contiguous()
        g = torch.from_numpy(self.first.x * (self.first.x @ s - self.first.y)[:, None])

        def inverse(operator: LocalOperator) -> Any:
            return lambda b: finish(exact(operator, b, 0.0)).x

        pretraining = inverse(self.first.operator(s, ["*"], self.l2))
        if alpha:
            held = self.second.operator(after, ["*"], proximal(self.l2, alpha, shared))
            parts = updated(f, inverse(held), pretraining, shared, alpha)
        else:
            head = inverse(self.second.operator(after, ["own.*"], self.l2))
            parts = fixed(f, head, self.second.operator(after, ["*"], self.l2), pretraining, shared)
        return (g @ parts.whole).numpy()


def read(config: dict[str, Any]) -> Stages:
    with gzip.open(ROOT / config["data"], "rt") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "target"]
    ordered = [*config["shared"], *(name for name in names if name not in config["shared"])]
    x = np.array([[float(row[name]) for name in ordered] for row in rows])
    y = np.array([float(row["target"]) for row in rows])
    x, y = ((values - values.mean(0)) / values.std(0) for values in (x, y))
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    order = permutation(derive_key(config["seed"], "patients"), len(y))
    common, cuts = len(config["shared"]), np.cumsum([config["pretraining"], config["finetuning"]])
    first, second, queries = (Stage(x[ids], y[ids], common) for ids in np.split(order, cuts))
    return Stages(first, second, queries, config["l2"])


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["alphas"])


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return how far influence is from the finite difference, and the mean effects of leaving each patient out."""
    stages, alpha, epsilon = read(config), config["alphas"][cell], config["epsilon"]
    m = len(stages.first.y)
    found = stages.influence(alpha)
    each = m * np.eye(m)
    slopes = [stages.answers(1 + epsilon * one, alpha) - stages.answers(1 - epsilon * one, alpha) for one in each]
    difference = np.array(slopes) / (2 * epsilon)
    left = np.array([stages.answers(1 - one / m, alpha) - stages.answers(1.0, alpha) for one in each])
    predicted = -found / m
    return {
        "error": float(np.linalg.norm(found - difference) / np.linalg.norm(difference)),
        "predicted": predicted.mean(1).tolist(),
        "truth": left.mean(1).tolist(),
        "pearson": float(stats.pearsonr(predicted.ravel(), left.ravel()).statistic),
        "slope": float((predicted * left).sum() / (predicted**2).sum()),
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    found: list[Gate] = []
    for cell in cells(config):
        one = done[cell]
        found += [
            Gate(f"relative distance from the finite difference, {cell}", one["error"], threshold=1e-6, at_least=False),
            correlation(f"pearson, left out and solved again, {cell}", *means(one), threshold=0.999),
            Gate(f"pearson over all pairs with a query, {cell}", one["pearson"]),
            Gate(f"slope over all pairs with a query, {cell}", one["slope"]),
        ]
    return found


def means(one: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted and true rises of the queries' mean loss, [m] each."""
    return np.array(one["predicted"]), np.array(one["truth"])


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw predicted against true rises for every α."""
    figure = Figure(figsize=(5 * len(done), 4.5), layout="constrained")
    for axes, (cell, one) in zip(figure.subplots(1, len(done), squeeze=False)[0], done.items(), strict=True):
        predicted, truth = means(one)
        scatter(axes, predicted, truth, f"{cell}: r = {stats.pearsonr(predicted, truth).statistic:.5f}")
    save(figure, folder, "left-out")


EXPERIMENT = Experiment(
    name="multistage.ridge",
    claim="Two ridge regressions: influence of a pretraining patient is the slope of both stages' closed forms (diabetes)",
    minutes=0.2,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
