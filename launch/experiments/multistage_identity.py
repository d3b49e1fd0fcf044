"""multistage.identity: what is left of multistage.fixed with identities for both inverse Hessians? (Chen et al. 2020, figure 3)

The same hundred images, chosen by the full method, and their true effects: those of multistage.fixed, where its full-size
pass has left them.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from launch.experiments.multistage_fixed import run_cell, truth_of
from launch.experiments.multistage_plots import correlation, drop, scatter, two_figures
from launch.experiments.multistage_stages import found_before, pieces
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

PAPER, PAPER_DROP = 0.17, 0.43


def cells(config: dict[str, Any]) -> list[str]:
    return ["influence", *pieces(config)]


def run_or_find(config: dict[str, Any], cell: str) -> dict[str, Any]:
    return found_before("multistage.fixed", cell, config) or run_cell(config, cell)


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    truth = truth_of(config, done)
    full, identity = (np.array(done["influence"][name]) for name in ("full", "identity"))
    return [
        correlation("pearson", identity, truth, threshold=0.35, at_least=False, paper=PAPER),
        drop("drop against fixed", full, identity, truth, threshold=0.20, paper=PAPER_DROP),
        *two_figures(identity, truth),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    truth, identity = truth_of(config, done), np.array(done["influence"]["identity"])
    figure = Figure(figsize=(6, 5), layout="constrained")
    title = f"identities for inverse Hessians: r = {stats.pearsonr(identity, truth).statistic:.2f}"
    scatter(figure.subplots(), identity, truth, title)
    save(figure, folder, "identity")


EXPERIMENT = Experiment(
    name="multistage.identity",
    claim="Without its inverse Hessians multi-stage influence says little of leaving a pretraining image out (MNIST)",
    minutes=1,
    cells=cells,
    run=run_or_find,
    gates=gates,
    plot=plot,
)
