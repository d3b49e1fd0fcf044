"""fastif.speed-quality: how LiSSA's error falls with its depth J, batch B and repetitions T (FastIF, appendix B.2, figure 9)

On the convex head, where the exact (C + λI)⁻¹v is known: the paper can only compare with its own most expensive setting. The
error is ‖x − x*‖/‖x*‖, the mean over queries. T repetitions of one example an iteration are to make up for its noise: with
independent errors T = 16 has a quarter of the error of one. Where the batches' noise is all that is left of the error (B = 1,
few repetitions) a larger J changes nothing more.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.metrics import bootstrap_interval
from engine.stochastic_solvers import Lissa, batch_scale, lissa_repetition
from launch.experiments.fastif_head import asked_gradients, convex, is_right, right_and_wrong, undamped
from launch.experiments.registry import Experiment, Gate


def cells(config: dict[str, Any]) -> list[str]:
    return [f"batch-{size}" for size in config["batch_sizes"]]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the relative error of every J, T and query for one batch size."""
    size = int(cell.removeprefix("batch-"))
    subject = convex(config["head"])
    test = subject.head.queries
    asked = asked_gradients(subject, test.take(right_and_wrong(is_right(subject, test), config["queries"])))
    damping = subject.head.l2
    exact = subject.solve(asked, damping)
    curvature, ids = undamped(subject), torch.arange(len(subject.own))
    scale = batch_scale(curvature, ids, size, config["seed"])
    most = max(config["repetitions"])
    settings = Lissa(damping, scale, max(config["depths"]), size, most, config["seed"])
    found: dict[int, list[Tensor]] = {depth: [] for depth in config["depths"]}
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


def table(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> np.ndarray:
    """Return all errors, [B, J, T, Q]."""
    return np.array([
        [[result["errors"][str(j)][str(t)] for t in config["repetitions"]] for j in config["depths"]]
        for result in done.values()
    ])  # fmt: skip


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge what 16 repetitions of one example are worth, and that the error falls along each setting; report errors."""
    found, first = table(config, done), next(iter(done.values()))
    mean, ts = found.mean(3), config["repetitions"]
    ratios = found[0, -1, -1] / found[0, -1, 0]
    falls = {"J": mean[:, 0, :] / mean[:, -1, :], "B": mean[0] / mean[-1], "T": mean[:, :, 0] / mean[:, :, -1]}
    depth = config["depths"][-1]
    return [
        Gate(f"error of T = {ts[-1]} over that of T = 1, B = 1, J = {depth}", float(ratios.mean()),
             bootstrap_interval(ratios), threshold=0.35, at_least=False),
        *(Gate(f"error at the smallest {name} over that at the largest, geometric mean", float(np.exp(np.log(ratio).mean())),
               threshold=1.0) for name, ratio in falls.items()),
        *(Gate(f"error at the smallest {name} over that at the largest, least", float(ratio.min()))
          for name, ratio in falls.items()),
        *(Gate(f"relative error, B = {size}, T = {t}, J = {depth}", float(mean[b, -1, k]), bootstrap_interval(found[b, -1, k]))
          for b, size in enumerate(config["batch_sizes"]) if size in (1, config["batch_sizes"][-1])
          for k, t in enumerate(ts)),
        Gate("λ_eff / λ_max", first["damping"] / first["largest"]),
        Gate("cos(identity, exact)", float(np.mean(first["identity"]))),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the error against J, a line for each B, a panel for each T."""
    mean, sizes = table(config, done).mean(3), config["batch_sizes"]
    figure = Figure(figsize=(3.6 * len(config["repetitions"]), 3.6), layout="constrained")
    panels = figure.subplots(1, len(config["repetitions"]), sharey=True, squeeze=False)[0]
    for k, (axes, t) in enumerate(zip(panels, config["repetitions"], strict=True)):
        for b, size in enumerate(sizes):
            shade = 0.15 + 0.7 * b / max(1, len(sizes) - 1)
            axes.plot(
                config["depths"], mean[b, :, k], ".-", color=(0.1, 0.75 - 0.6 * shade, shade), label=f"B = {size}"
            )
        axes.set(yscale="log", xlabel="recursions J")
        axes.set_title(f"T = {t}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("‖x − x*‖ / ‖x*‖")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    for kind in ("png", "svg"):
        figure.savefig(Path(folder) / f"quality.{kind}", dpi=100)


EXPERIMENT = Experiment(
    name="fastif.speed-quality",
    claim="LiSSA's error falls with depth, batch and repetitions: against the exact solve of a convex head, 8,000 reviews",
    minutes=10,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
