"""influence.sketch: is the inverse-Hessian sketch of TracIn's appendix A.1 unbiased, and what is it worth?

S ≈ H⁻¹Gᵀ is found by stochastic descent along 2 H_{B₁}(H_{B₂}S − Gᵀ), and S(Gv) stands for H⁻¹v. On a logistic head, whose
L2 term is large enough for the descent to converge, the mean of vᵀS(Gv)/vᵀH⁻¹v over independent sketches is held against 1,
by its standard error; the same with one batch in both places must be found biased. A cell is a way of drawing, a number of
columns d and a seed: its own G and batches. Beside it how one sketch ranks the training examples.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.curvature import Operator
from engine.metrics import bootstrap_interval
from engine.solvers import finish, largest_eigenvalue
from engine.stochastic_solvers import Sketch, batch_scale, sketch_columns, sketch_matrix, sketch_step, sketched
from launch.experiments.heads import Head, LogisticOperator, gradients, logistic, whole_matrix
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

DRAWN = {"two": "two batches", "same": "one batch for both"}
COLOURS = {"two": "#0b6e4f", "same": "#c8553d"}
ERRORS = 3.0  # standard errors


class SameBatch:
    """An operator whose every second product takes the batch of the one before: the sketch's B₁ becomes B₂."""

    def __init__(self, operator: Operator) -> None:
        self.size, self._operator = operator.size, operator
        self._last: Tensor | None = None

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        ids, self._last = (ids, ids) if self._last is None else (self._last, None)
        return self._operator.apply(block, ids)


OPERATORS = {"two": lambda operator: operator, "same": SameBatch}


def cells(config: dict[str, Any]) -> list[str]:
    return [f"{drawn}-{d}-{seed}" for d in config["columns"] for drawn in DRAWN for seed in range(config["seeds"])]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Make one sketch; return what it makes of vᵀH⁻¹v and of the ranking, and how long the descent's steps were."""
    drawn, d, seed = cell.split("-")
    head = logistic(config)
    asked = gradients(head, head.queries.take(torch.arange(config["queries"])))
    operator = LogisticOperator(head)
    s, g = sketch(operator, head, config, OPERATORS[drawn](operator), int(d), int(seed))
    truth = torch.linalg.solve(whole_matrix(operator), asked.T)
    found, _ = sketched(asked.T, [(s, g)])
    rows = gradients(head, head.train)
    pairs = zip((rows @ found).T.numpy(), (rows @ truth).T.numpy(), strict=True)
    return {
        "ratio": float(((asked.T * found).sum(0) / (asked.T * truth).sum(0)).mean()),
        "spearman": float(np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])),
        "error": float(((found - truth).norm(dim=0) / truth.norm(dim=0)).mean()),
    }


def sketch(
    operator: Operator, head: Head, config: dict[str, Any], drawing: Operator, columns: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return S and Gᵀ, (p, d) each, with the step that a job would choose."""
    ids, size = torch.arange(len(head.train.labels)), config["batch_size"]
    largest = finish(largest_eigenvalue(operator))
    step = sketch_step(max(largest, batch_scale(operator, ids, size)))
    settings = Sketch(0.0, step, columns, columns, config["iterations"], size, seed)
    g = sketch_matrix({"head": operator.size}, settings, 0)
    return finish(sketch_columns(drawing, g, ids, settings, 0, largest)), g


def of(done: dict[str, dict[str, Any]], drawn: str, d: int, figure: str) -> np.ndarray:
    """Return one figure of every seed."""
    return np.array([result[figure] for cell, result in done.items() if cell.startswith(f"{drawn}-{d}-")])


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge by how many standard errors the mean ratio is off 1, which two batches must not and one batch must be."""
    found = []
    for d in config["columns"]:
        for drawn, name in DRAWN.items():
            ratios = of(done, drawn, d, "ratio")
            off = abs(ratios.mean() - 1) / (ratios.std(ddof=1) / len(ratios) ** 0.5)
            found += [
                Gate(f"standard errors off, {name}, d = {d}", float(off), None, ERRORS, at_least=drawn == "same"),
                Gate(f"vᵀSGv/vᵀH⁻¹v, {name}, d = {d}", float(ratios.mean()), bootstrap_interval(ratios)),
            ]
        for figure, label in (
            ("spearman", "Spearman of one sketch with exact"),
            ("error", "relative error of one sketch"),
        ):
            values = of(done, "two", d, figure)
            found.append(Gate(f"{label}, d = {d}", float(values.mean()), bootstrap_interval(values)))
    return found


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the ratio of every sketch, with the mean and three standard errors."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="#888888", linewidth=0.8)
    places = [(d, drawn) for d in config["columns"] for drawn in DRAWN]
    for place, (d, drawn) in enumerate(places):
        ratios = of(done, drawn, d, "ratio")
        error = ERRORS * ratios.std(ddof=1) / len(ratios) ** 0.5
        axes.plot(np.full(len(ratios), place), ratios, ".", color=COLOURS[drawn], alpha=0.4)
        axes.errorbar(place + 0.15, ratios.mean(), error, fmt="o", color=COLOURS[drawn], markersize=4)
    axes.set_xticks(range(len(places)), [f"d = {d}\n{DRAWN[drawn]}" for d, drawn in places], fontsize=8)
    axes.set_ylabel("vᵀS(Gv) / vᵀH⁻¹v, mean over queries")
    axes.set_title("A point per sketch; bars: mean ± 3 standard errors", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "sketch")


EXPERIMENT = Experiment(
    name="influence.sketch",
    claim="The inverse-Hessian sketch is unbiased with two independent batches, and biased with one for both",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
