"""turnover.self-influence: do training reviews help themselves? (Kobayashi et al. 2020, appendix D, figure 6)

MiniLM with adapters and a wide head, trained under masks: L(f^m̃(z), z) − L(f^m(z), z) of every training review, and the same
difference on the same reviews under the masks of ids that no training saw, whose sign must be a coin's. A cell is a seed, the
last one the mean of all seeds' differences: what averaging over mask seeds makes of the share.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.batches import Batch
from engine.masks import unseen_ids
from engine.metrics import bootstrap_interval
from engine.turnover_scores import self_influence
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, accuracy, loss
from launch.experiments.turnover_subject import Network, read_texts, trained

KINDS = {"own": ("their own masks", "#3d5a98"), "unseen": ("never-trained ids' masks", "#888888")}
SHOWN = 1.5  # the histogram's ends hold what lies beyond
BINS = 60


def cells(config: dict[str, Any]) -> list[str]:
    return [*(f"seed-{seed}" for seed in config["seeds"]), "mean"]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return positive share, mean, its standard error and histogram of the differences under both kinds of masks.

    With them the full network's test accuracy.
    """
    seeds = config["seeds"] if cell == "mean" else [int(cell.removeprefix("seed-"))]
    train = read_texts(config["network"], config["movie"]).parts["train"].take(torch.arange(config["rows"]))
    networks = [trained(config, config["movie"], True, config["rows"], seed) for seed in seeds]
    masks = {"own": torch.arange(config["rows"]), "unseen": unseen_ids(config["rows"])}
    found: dict[str, Any] = {
        kind: described(torch.stack([differences(network, train, ids) for network in networks]).mean(0))
        for kind, ids in masks.items()
    }
    test = read_texts(config["network"], config["movie"]).parts["test"]
    return found | {"accuracy": float(np.mean([100 * accuracy(network.model, test) for network in networks]))}


def differences(network: Network, part: Part, ids: Tensor) -> Tensor:
    """Return L(f^m̃(i), z) − L(f^m(i), z) of every row z under the masks of its id i, float64 [n]."""
    found = torch.empty(len(ids), dtype=torch.float64)
    for batch in part.batches():
        found[batch.ids] = self_influence(network.turnover, loss, Batch(ids[batch.ids], batch.tensors))
    return found


def described(values: Tensor) -> dict[str, Any]:
    counts, _ = np.histogram(values.clamp(-SHOWN, SHOWN).numpy(), BINS, (-SHOWN, SHOWN))
    return {
        "positive": float((values > 0).double().mean()),
        "mean": float(values.mean()),
        "error": float(values.std() / len(values) ** 0.5),
        "histogram": counts.tolist(),
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the share of positive differences, and that never-trained ids have none; intervals over seeds."""

    def of(kind: str, figure: str) -> np.ndarray:
        return np.array([done[f"seed-{seed}"][kind][figure] for seed in config["seeds"]])

    def over_seeds(name: str, values: np.ndarray, threshold: float | None = None) -> Gate:
        return Gate(name, float(values.mean()), bootstrap_interval(values), threshold)

    unseen, accuracies = of("unseen", "positive"), [done[f"seed-{seed}"]["accuracy"] for seed in config["seeds"]]
    return [
        over_seeds("positive share", of("own", "positive"), threshold=0.85),
        Gate("never-trained ids: positive share, distance from .5", abs(float(unseen.mean()) - 0.5), threshold=0.03,
             at_least=False),
        over_seeds("never-trained ids: positive share", unseen),
        Gate(f"positive share of the mean over {len(config['seeds'])} mask seeds", done["mean"]["own"]["positive"]),
        over_seeds("test accuracy of the full network, %", np.array(accuracies)),
        over_seeds("mean self-influence", of("own", "mean")),
        over_seeds("never-trained ids: mean", of("unseen", "mean")),
        Gate("never-trained ids: largest |mean| in standard errors",
             float((np.abs(of("unseen", "mean")) / of("unseen", "error")).max())),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw both histograms, all seeds together."""
    done = {cell: one for cell, one in done.items() if cell != "mean"}
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(-SHOWN, SHOWN, BINS + 1)
    for kind, (name, colour) in KINDS.items():
        counts = np.sum([one[kind]["histogram"] for one in done.values()], axis=0)
        positive = np.mean([one[kind]["positive"] for one in done.values()])
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.55, label=f"{name}: {positive:.1%} positive")
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set(xlabel="influence of a training review on its own loss", ylabel=f"reviews, {len(done)} seeds")
    axes.set_title(f"{config['rows']:,} reviews; the ends hold what lies beyond", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save(figure, folder, "self_influence")


EXPERIMENT = Experiment(
    name="turnover.self-influence",
    claim="Training reviews lower their own loss, and ids that were never trained do not",
    minutes=40,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
