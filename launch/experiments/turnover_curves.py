"""turnover.learning-curves: does the sub-network that never trains on a review know it as little as a test review? (figure 2)

The trainings with masks of turnover.accuracy, epoch by epoch: mean loss of training reviews under their own masks (falls as a
training loss does), of the same reviews under the flipped masks (must follow the test loss and not overfit), of test reviews
under masks that no training saw, and of test reviews in the full network. A cell is a seed.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from engine.metrics import bootstrap_interval
from engine.turnover_scores import curves
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import loss
from launch.experiments.turnover_subject import Training, chosen_rate, kept_weights, make_network, read_texts

CURVES = {
    "own": ("training, own masks", "#3d5a98"),
    "flipped": ("training, flipped masks", "#c8553d"),
    "random": ("test, random masks", "#d9932f"),
    "test": ("test, full network", "#888888"),
}


def cells(config: dict[str, Any]) -> list[str]:
    return [f"seed-{seed}" for seed in config["seeds"]]


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the four mean losses before training and after every epoch."""
    seed, movie = int(cell.removeprefix("seed-")), config["movie"]
    texts = read_texts(config["network"], movie)
    rate = chosen_rate(config, movie, masked=True)
    training = Training(True, rate, config["rows"], seed, config["train"]["epochs"])
    looked = texts.parts["train"].take(torch.arange(config["looked_at"])), texts.parts["test"]
    train, test = ([part.batch(rows) for rows in torch.arange(len(part.labels)).split(64)] for part in looked)
    network = make_network(config["network"], len(texts.classes), seed)
    network.model.eval()
    points = [curves(network.turnover, loss, train, test)]
    for weights in kept_weights(config["network"], movie, training):
        points.append(curves(network.load(weights).turnover, loss, train, test))
    return {"curves": [asdict(point) for point in points]}


def losses_of(done: dict[str, dict[str, Any]], curve: str) -> np.ndarray:
    """Return one curve's losses, [seeds, epochs + 1]."""
    return np.array([[point[curve] for point in one["curves"]] for one in done.values()])


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the flipped masks' training loss against the random masks' test loss at the end; intervals over seeds."""
    last = {curve: losses_of(done, curve)[:, -1] for curve in CURVES}
    ratio = last["flipped"] / last["random"]

    def over_seeds(name: str, found: np.ndarray) -> Gate:
        return Gate(name, float(found.mean()), bootstrap_interval(found))

    return [
        Gate("flipped training loss, distance from the masked test loss, share", abs(float(ratio.mean()) - 1),
             threshold=0.15, at_least=False),
        over_seeds("flipped training loss over masked test loss", ratio),
        over_seeds("own training loss over flipped training loss", last["own"] / last["flipped"]),
        *(over_seeds(f"loss at the end: {name}", last[curve]) for curve, (name, _) in CURVES.items()),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the four curves: mean and range over the seeds."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for curve, (name, colour) in CURVES.items():
        found = losses_of(done, curve)
        epochs = np.arange(found.shape[1])
        axes.fill_between(epochs, found.min(0), found.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(epochs, found.mean(0), ".-", color=colour, label=name)
    axes.set_xticks(epochs)
    axes.set(xlabel="epoch", ylabel="mean loss")
    axes.set_title(
        f"{config['rows']:,} reviews (line: mean, band: range over {len(done)} seeds)", loc="left", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save(figure, folder, "curves")


EXPERIMENT = Experiment(
    name="turnover.learning-curves",
    claim="Under its flipped mask a training review's loss follows the test loss: that sub-network has not learned it",
    minutes=8,
    cells=cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
