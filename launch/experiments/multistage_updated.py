"""multistage.updated: does influence say what leaving a pretraining image out does, W updated? (Chen et al. 2020, figure 2c)

Fine-tuning moves W as well. Influence is that of the proximal objective F + α ‖W − W̄‖² at its minimum, α = 1/(2ηT) of the
schedule below, which is also the paper's 0.01. The truth is twofold: (i) that objective, minimised again without the image,
and (ii) the schedule itself, T full-batch steps of rate η from W̄ and Θ = 0 that stop early, done again. The hundred images are
chosen by influence at the minimum; reported besides are influence at the weights where the schedule stopped, and other α.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.multistage import early_stopping, proximal, updated
from launch.experiments.multistage_digits import Objective, accuracy
from launch.experiments.multistage_plots import correlation, scatter, two_figures
from launch.experiments.multistage_stages import (
    Case,
    case_of,
    choose,
    piece_of,
    pieces,
    started,
    updated_case,
    updated_parts,
    without,
)
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

PAPER = 0.40


def cells(config: dict[str, Any]) -> list[str]:
    return ["influence", *pieces(config)]


def make_case(config: dict[str, Any]) -> Case:
    return updated_case(config, alpha_of(config))


def alpha_of(config: dict[str, Any]) -> float:
    return early_stopping(config["schedule"]["learning_rate"], config["schedule"]["steps"])


def scheduled(objective: Objective, x: Tensor, rate: float, steps: int) -> Tensor:
    """Return the weights after so many full-batch steps of gradient descent: the same ones every time."""
    for _ in range(steps):
        x = x - rate * objective.slope(x)[1]
    return x


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return predicted rises of the test loss, or both true ones of some images."""
    case, schedule = case_of(make_case, config), config["schedule"]
    rate, steps, alpha = schedule["learning_rate"], schedule["steps"], alpha_of(config)
    m = len(case.pretraining.objective.examples)
    full = -case.influence(updated_parts(case, alpha)) / m
    chosen = choose(full, config)
    ids = [*chosen["top"], *chosen["random"]]

    def stopped(x: Tensor) -> Tensor:
        return scheduled(case.joint, started(case.joint, case.shared, x), rate, steps)

    at = stopped(case.pretraining.x)
    if cell != "influence":
        moved = [without(case, i, case.pretraining.scaling, config) for i in ids[piece_of(cell)]]
        return {
            "ids": ids[piece_of(cell)],
            "proximal": [case.answer(case.again(x)) - case.answer(case.x) for x in moved],
            "schedule": [case.answer(stopped(x)) - case.answer(at) for x in moved],
        }
    by_alpha = {f"{a:g}": (-stopped_influence(case, at, a) / m)[ids].tolist() for a in config["alphas"]}
    return {
        "ids": ids,
        "full": full[ids].tolist(),
        "stopped": by_alpha,
        "alpha": alpha,
        "lowest": [float(torch.linalg.eigvalsh(one.hessian)[0]) for one in (case.pretraining, case.finetuning)],
        "accuracy": {
            "proximal": accuracy(case.joint, case.x, case.test),
            "schedule": accuracy(case.joint, at, case.test),
        },
        "moved": float((at - started(case.joint, case.shared, case.pretraining.x))[case.shared.finetuning].norm()),
    }


def stopped_influence(case: Case, at: Tensor, alpha: float) -> Tensor:
    """Return I of every image by the Hessian at the weights where the schedule stopped, which is no minimum."""
    held = case.joint.hessian(at) + torch.diag(proximal(0.0, alpha, case.shared)[:, 0])
    question = case.joint.summed(at, case.test)[1][:, None]
    parts = updated(
        question, lambda b: torch.linalg.solve(held, b), case.pretraining.inverse, case.shared, alpha
    )  # fmt: skip
    return case.influence(parts)


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    found = done["influence"]
    predicted, schedule, exact = (
        np.array(found["full"]),
        truth_of(config, done, "schedule"),
        truth_of(config, done, "proximal"),
    )
    return [
        correlation("pearson", predicted, schedule, threshold=0.40, paper=PAPER),
        *two_figures(predicted, schedule),
        correlation("pearson, proximal objective", predicted, exact),
        *(Gate(f"{gate.name}, proximal objective", gate.value, gate.ci) for gate in two_figures(predicted, exact)),
        *(
            correlation(f"pearson, at the stopped weights, α = {alpha}", np.array(values), schedule)
            for alpha, values in found["stopped"].items()
        ),
        Gate("accuracy on the test images, schedule", found["accuracy"]["schedule"]),
        Gate("accuracy on the test images, proximal objective", found["accuracy"]["proximal"]),
    ]


def truth_of(config: dict[str, Any], done: dict[str, dict[str, Any]], name: str) -> np.ndarray:
    return np.concatenate([done[cell][name] for cell in pieces(config)])


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw predicted against both true rises, and r against α."""
    predicted = np.array(done["influence"]["full"])
    figure = Figure(figsize=(15, 5), layout="constrained")
    *pair, last = figure.subplots(1, 3)
    for axes, name in zip(pair, ("schedule", "proximal"), strict=True):
        truth = truth_of(config, done, name)
        scatter(axes, predicted, truth, f"{name} again: r = {stats.pearsonr(predicted, truth).statistic:.2f}")
    found, truth = done["influence"]["stopped"], truth_of(config, done, "schedule")
    rs = [stats.pearsonr(np.array(values), truth).statistic for values in found.values()]
    last.semilogx([float(a) for a in found], rs, "o-", color="#2f9470")
    last.set(xlabel="α, at the stopped weights", ylabel="Pearson r with the schedule done again")
    last.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "left-out")


EXPERIMENT = Experiment(
    name="multistage.updated",
    claim="Influence of a pretraining image on a model fine-tuned as a whole against leaving it out of both stages (MNIST)",
    minutes=40,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
