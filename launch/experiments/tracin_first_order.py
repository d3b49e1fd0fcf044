"""tracin.first-order: is one step's effect on a test loss what TracIn's dot product says? (Pruthi et al. 2020, figure 7)

A fresh MLP is trained on MNIST by plain SGD, one digit a step or a mini-batch. At every step the fall of the loss of each
test digit z′, ℓ(w_t, z′) − ℓ(w_{t+1}, z′), stands beside η g·∇ℓ(w_t, z′), g the mean gradient of the step's digits. What
first order leaves out is ½ η² gᵀH′g, so both agree as η goes to 0. A cell is one batch size, learning rate and seed: its
own initial weights and order.

Correlation and slope (least squares through the origin) are taken over the steps for each test digit, so that large
differences between test digits cannot pass for agreement; intervals resample the test digits, each the mean of its seeds.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.batches import Batch
from engine.counters import derive_key, permutation
from engine.methods.tracin_ideal import StepEffect, every_step
from engine.metrics import bootstrap_interval
from engine.training import TrainSettings
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, loss, make_subject

SMALL = 0.01  # up to this rate the correlation is judged
LEAST_R, SLACK = 0.95, 0.05
SHOWN = 200  # pairs of a cell that are drawn
COLOURS = ("#0b6e4f", "#3d5a98", "#d9932f")  # of the batch sizes
Run = tuple[int, float]  # batch size, learning rate


def runs(config: dict[str, Any]) -> list[Run]:
    return [(batch["size"], rate) for batch in config["batches"] for rate in batch["rates"]]


def rates_of(config: dict[str, Any], size: int) -> list[float]:
    return [rate for own, rate in runs(config) if own == size]


def cell_of(run: Run, seed: int) -> str:
    return f"batch-{run[0]}-rate-{run[1]:g}-seed-{seed}"


def cells(config: dict[str, Any]) -> list[str]:
    return [cell_of(run, seed) for run in runs(config) for seed in config["seeds"]]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Train; return correlation and slope of every test digit, and some pairs to draw."""
    (size, rate), seed = next((run, s) for run in runs(config) for s in config["seeds"] if cell_of(run, s) == cell)
    subject = make_subject("mnist", config)
    train, test = (in_double(subject.parts[name]) for name in ("train", "test"))
    torch.manual_seed(derive_key(seed, "weights") % 2**31)
    model = subject.build().double()
    epochs = next(batch["epochs"] for batch in config["batches"] if batch["size"] == size)
    settings = TrainSettings(epochs, size, rate, optimizer="sgd", checkpoints=1, seed=seed)

    def collate(rows: list[int]) -> Batch:
        return train.batch(torch.tensor(rows))

    queries = test.batch(torch.arange(len(test.labels)))
    return compare(list(every_step(model, loss, collate, list(range(len(train.labels))), queries, settings)), seed)


def in_double(part: Part) -> Part:
    assert isinstance(part.inputs, Tensor)
    return Part(part.inputs.double(), part.labels)


def compare(effects: list[StepEffect], seed: int) -> dict[str, Any]:
    """Return how well first order tells the falls: by test digit over the steps, and over all pairs together."""
    said = torch.stack([effect.first_order for effect in effects]).numpy()  # [steps, Q]
    fell = torch.stack([effect.fall for effect in effects]).numpy()
    drawn = permutation(derive_key(seed, "drawn"), said.size)[:SHOWN]
    return {
        "r": [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(said.T, fell.T, strict=True)],
        "slope": ((said * fell).sum(0) / (said * said).sum(0)).tolist(),
        "r_all": float(np.corrcoef(said.ravel(), fell.ravel())[0, 1]),
        "spearman_all": float(stats.spearmanr(said.ravel(), fell.ravel()).statistic),
        "pairs": [[float(f"{x:.4g}") for x in side.ravel()[drawn]] for side in (said, fell)],
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the correlation at small rates and, for each batch size, the slope at the smallest; report the rest."""
    judged, told = list[Gate](), list[Gate]()
    for run in runs(config):
        size, rate = run
        name = f"η = {rate:g}, batch size {size}"
        correlation = mean_gate(f"r, {name}", by_digit(config, done, run, "r"), LEAST_R if rate <= SMALL else None)
        (judged if rate <= SMALL else told).append(correlation)
        slope = by_digit(config, done, run, "slope")
        if rate == min(rates_of(config, size)):
            judged.append(mean_gate(f"slope at least, {name}", slope, 1 - SLACK))
            judged.append(mean_gate(f"slope at most, {name}", slope, 1 + SLACK, at_least=False))
        else:
            told.append(mean_gate(f"slope, {name}", slope))
        if rate < SMALL:
            continue
        for key, what in (("r_all", "r of all pairs together"), ("spearman_all", "Spearman of all pairs together")):
            told.append(mean_gate(f"{what}, {name}", np.array([done[cell_of(run, s)][key] for s in config["seeds"]])))
    return judged + told


def by_digit(config: dict[str, Any], done: dict[str, dict[str, Any]], run: Run, key: str) -> np.ndarray:
    """Return one figure per test digit [Q]: its mean over the seeds."""
    return np.mean([done[cell_of(run, seed)][key] for seed in config["seeds"]], axis=0)


def mean_gate(name: str, values: np.ndarray, threshold: float | None = None, at_least: bool = True) -> Gate:
    return Gate(name, float(values.mean()), bootstrap_interval(values), threshold, at_least)


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw what happened against what first order says for each run, and correlation and slope against the rate."""
    colours = dict(zip(dict(runs(config)), COLOURS, strict=False))
    rows = -(-(len(runs(config)) + 1) // 3)
    figure = Figure(figsize=(10.8, 3.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes, run in zip(panels, runs(config), strict=False):
        draw_pairs(axes, config, done, run, colours[run[0]])
    draw_rates(panels[len(runs(config))], config, done, colours)
    for axes in panels[len(runs(config)) + 1 :]:
        axes.set_visible(False)
    figure.suptitle(
        "Fall of a test digit's loss in one step of SGD, against TracIn's dot product η g·∇ℓ(z′)", fontsize=11
    )
    save(figure, folder, "first_order", dpi=150)


def draw_pairs(axes: Axes, config: dict[str, Any], done: dict[str, dict[str, Any]], run: Run, colour: str) -> None:
    """Scatter the kept pairs of all seeds; powers of ten either side of zero."""
    said, fell = np.hstack([done[cell_of(run, seed)]["pairs"] for seed in config["seeds"]])
    far, near = max(np.abs(said).max(), np.abs(fell).max()), float(np.quantile(np.abs(said), 0.3))
    axes.plot([-2 * far, 2 * far], [-2 * far, 2 * far], color="#bbbbbb", linewidth=0.8)
    axes.scatter(said, fell, s=7, color=colour, alpha=0.45, linewidths=0)
    axes.set_xscale("symlog", linthresh=near)
    axes.set_yscale("symlog", linthresh=near)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([-far, -near, 0, near, far], [f"{x:.0e}" if x else "0" for x in (-far, -near, 0, near, far)])
    axes.tick_params(labelsize=6)
    r, slope = (by_digit(config, done, run, key).mean() for key in ("r", "slope"))
    axes.set_title(f"batch size {run[0]}, η = {run[1]:g}: r {r:.3f}, slope {slope:.3f}", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_rates(axes: Axes, config: dict[str, Any], done: dict[str, dict[str, Any]], colours: dict[int, str]) -> None:
    """Draw correlation and slope, means over test digits and seeds, against the learning rate."""
    axes.axhspan(1 - SLACK, 1 + SLACK, color="#eeeeee", zorder=0)
    for line, (size, colour) in enumerate(colours.items()):
        rates = sorted(rates_of(config, size))
        for key, style in (("r", "-"), ("slope", ":")):
            values = [by_digit(config, done, (size, rate), key).mean() for rate in rates]
            axes.plot(rates, values, style, marker="o", markersize=3, color=colour)
        axes.text(0.03, 0.17 - 0.08 * line, f"batch size {size}", color=colour, fontsize=8, transform=axes.transAxes)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate η", ylim=(0.5, 1.07))
    axes.set_title("r (line) and slope (dotted); band: 1 ± .05", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    name="tracin.first-order",
    claim="One step's effect on a test loss is η g·g′ to first order: every step on MNIST, 100 test digits",
    minutes=14,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
