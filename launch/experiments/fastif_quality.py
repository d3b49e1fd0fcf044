"""fastif.speed-quality: how LiSSA's error falls with its depth J, batch B and repetitions T (FastIF, appendix B.2, figure 9)

On the convex head, where the exact (C + λI)⁻¹v is known: the paper can only compare with its own most expensive setting. The
error is ‖x − x*‖/‖x*‖, the mean over queries. It has two parts: what J recursions leave undone, which neither B nor T
changes, and the batches' noise, which J does not change and which falls with √B and √T, to a quarter at T = 16. Which of
them is seen depends on λ: J recursions have come to an end where J λ/s is a few. So a grid of settings has a λ.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.metrics import bootstrap_interval
from engine.stochastic_solvers import Lissa, batch_scale, lissa_repetition
from launch.experiments.fastif_head import asked_gradients, convex, is_right, right_and_wrong, undamped
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate


def cells(config: dict[str, Any]) -> list[str]:
    return [f"{name}-batch-{size}" for name, grid in config["grids"].items() for size in grid["batch_sizes"]]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the relative error of every J, T and query for one grid and batch size."""
    name, _, size = cell.partition("-batch-")
    return errors_of(config, config["grids"][name], int(size))


def errors_of(config: dict[str, Any], grid: dict[str, Any], size: int) -> dict[str, Any]:
    subject = convex(config["head"])
    test = subject.head.queries
    asked = asked_gradients(subject, test.take(right_and_wrong(is_right(subject, test), config["queries"])))
    damping = grid["damping"] * subject.largest if "damping" in grid else subject.head.l2
    exact = subject.solve(asked, damping)
    curvature, ids = undamped(subject), torch.arange(len(subject.own))
    scale = batch_scale(curvature, ids, size, config["seed"])
    most = max(config["repetitions"])
    settings = Lissa(damping, scale, max(grid["depths"]), size, most, config["seed"])
    found: dict[int, list[Tensor]] = {depth: [] for depth in grid["depths"]}
    for repetition in range(most):
        for state in lissa_repetition(curvature, asked, ids, settings, repetition, subject.largest):
            if state.iteration in found:
                found[state.iteration].append(state.x / scale)
    return {
        "scale": scale,
        "damping": damping,
        "largest": subject.largest,
        "identity": torch.nn.functional.cosine_similarity(asked, exact, dim=0).tolist(),
        "errors": {
            str(depth): {str(t): errors(torch.stack(runs), exact, t).tolist() for t in config["repetitions"]}
            for depth, runs in found.items()
        },
    }


def errors(runs: Tensor, exact: Tensor, repetitions: int) -> Tensor:
    """Return each query's relative error [Q] of a mean of so many repetitions, over all such groups of runs [T, p, Q]."""
    means = torch.stack([group.mean(0) for group in runs.split(repetitions)])
    return ((means - exact).norm(dim=1) / exact.norm(dim=0)).mean(0)


def table(config: dict[str, Any], name: str, done: dict[str, dict[str, Any]]) -> np.ndarray:
    """Return all errors of a grid, [B, J, T, Q]."""
    grid = config["grids"][name]
    found = [done[f"{name}-batch-{size}"]["errors"] for size in grid["batch_sizes"]]
    return np.array([[[one[str(j)][str(t)] for t in config["repetitions"]] for j in grid["depths"]] for one in found])


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge every grid alike, unless it is there to be reported alone."""
    return [gate for name in config["grids"] for gate in gates_of(config, name, done)]


def gates_of(config: dict[str, Any], name: str, done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge what 16 repetitions of one example are worth, and that the error falls along each setting; report errors."""
    grid, ts = config["grids"][name], config["repetitions"]
    found, first = table(config, name, done), done[f"{name}-batch-{grid['batch_sizes'][0]}"]
    mean, ratios, depth = found.mean(3), found[0, -1, -1] / found[0, -1, 0], grid["depths"][-1]
    falls = {"J": mean[:, 0, :] / mean[:, -1, :], "B": mean[0] / mean[-1], "T": mean[:, :, 0] / mean[:, :, -1]}
    judged = grid.get("judged", True)
    where = f"λ = {grid['called']}: "
    return [
        Gate(f"{where}error of T = {ts[-1]} over that of T = 1, B = 1, J = {depth}", float(ratios.mean()),
             bootstrap_interval(ratios), threshold=0.35 if judged else None, at_least=False),
        *(Gate(f"{where}error at the smallest {along} over that at the largest, geometric mean",
               float(np.exp(np.log(ratio).mean())), threshold=1.0)
          for along, ratio in falls.items() if judged),
        *(Gate(f"{where}error at the smallest {along} over that at the largest, least", float(ratio.min()))
          for along, ratio in falls.items() if judged),
        *(Gate(f"{where}relative error, B = {size}, T = {t}, J = {depth}", float(mean[b, -1, k]),
               bootstrap_interval(found[b, -1, k]))
          for b, size in enumerate(grid["batch_sizes"]) if size in (1, grid["batch_sizes"][-1])
          for k, t in enumerate(ts)),
        Gate(f"{where}λ_eff / λ_max", first["damping"] / first["largest"]),
        Gate(f"{where}cos(identity, exact)", float(np.mean(first["identity"]))),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the error against J, a line for each B, a panel for each T and a row for each grid."""
    names, ts = list(config["grids"]), config["repetitions"]
    figure = Figure(figsize=(3.6 * len(ts), 3.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(ts), sharey=True, squeeze=False)
    for row, name in zip(panels, names, strict=True):
        grid, mean = config["grids"][name], table(config, name, done).mean(3)
        for k, (axes, t) in enumerate(zip(row, ts, strict=True)):
            for b, size in enumerate(grid["batch_sizes"]):
                shade = 0.15 + 0.7 * b / max(1, len(grid["batch_sizes"]) - 1)
                colour = (0.1, 0.75 - 0.6 * shade, shade)
                axes.plot(grid["depths"], mean[b, :, k], ".-", color=colour, label=f"B = {size}")
            axes.set(yscale="log", xlabel="recursions J")
            axes.set_title(f"T = {t}, λ = {grid['called']}", loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("‖x − x*‖ / ‖x*‖")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, folder, "quality")


EXPERIMENT = Experiment(
    name="fastif.speed-quality",
    claim="LiSSA's error falls with depth, batch and repetitions: against the exact solve of a convex head, 8,000 reviews",
    minutes=15,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
