"""multistage.fixed: does influence say what leaving a pretraining image out does, W fixed? (Chen et al. 2020, 4.1, figure 2b)

A convolutional network is pretrained on the digits 0 to 3 and its embedding W kept; a head is then fitted to the other
digits. Asked is the summed loss of the test images. A hundred pretraining images, the 50 of largest |I| and 50 others, are
left out one by one and both stages done again until no gradient is left; Hessians are whole matrices and exact.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from launch.experiments.multistage_digits import accuracy, rows_of
from launch.experiments.multistage_plots import correlation, scatter, sides, two_figures
from launch.experiments.multistage_stages import (
    Case,
    case_of,
    choose,
    fixed_case,
    fixed_parts,
    piece_of,
    pieces,
    without,
)
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import ROOT

PAPER = 0.6
ASKED, SHOWN = 6, 5  # misclassified test images, and harmful images shown for each


def cells(config: dict[str, Any]) -> list[str]:
    return ["influence", "worst", *pieces(config)]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return predicted rises of the test loss by the full method and with identities, or the true ones of some images."""
    case = case_of(fixed_case, config)
    if cell == "worst":
        return worst(case)
    pretraining, own = case.pretraining, case.finetuning
    full = -case.influence(fixed_parts(case, own.inverse, pretraining.inverse)) / len(pretraining.objective.examples)
    chosen = choose(full, config)
    ids = [*chosen["top"], *chosen["random"]]
    if cell != "influence":
        return {"ids": ids[piece_of(cell)], "truth": truths(case, ids[piece_of(cell)], config)}
    plain = fixed_parts(case, lambda b: b, lambda r: r)
    identity = -case.influence(plain) / len(full)
    return {
        "ids": ids,
        "full": full[ids].tolist(),
        "identity": identity[ids].tolist(),
        "images": len(full),
        "weights": {"W, U": len(pretraining.x), "W, Θ": len(case.x), "Θ": len(own.x)},
        "lowest": [float(torch.linalg.eigvalsh(one.hessian)[0]) for one in (pretraining, own)],
        "gradient": [float(one.objective.slope(one.x)[1].norm()) for one in (pretraining, own)],
        "accuracy": {
            "pretraining": accuracy(pretraining.objective, pretraining.x, pretraining.objective.examples),
            "test": accuracy(case.joint, case.x, case.test),
        },
    }


def worst(case: Case) -> dict[str, Any]:
    """Return some misclassified test images and, for each, the pretraining images of most harmful influence (figure 4)."""
    case.joint.put(case.x)
    with torch.no_grad():
        wrong = (case.joint.model(case.test["x"]).argmax(1) != case.test["target"]).nonzero()[:ASKED, 0]
    own, found = case.finetuning, []
    for row in wrong.tolist():
        one = replace(case, test=rows_of(case.test, slice(row, row + 1)))
        influence = case.influence(fixed_parts(one, own.inverse, case.pretraining.inverse))
        top = influence.argsort(descending=True, stable=True)[:SHOWN]
        found.append({
            "test": int(case.test.ids[row]),
            "harmful": case.pretraining.objective.examples.ids[top].tolist(),
            "influence": influence[top].tolist(),
        })  # fmt: skip
    return {"found": found}


def truths(case: Case, ids: list[int], config: dict[str, Any]) -> list[float]:
    """Return what the summed test loss rises by without each of these images."""
    scaling, before = case.pretraining.scaling, case.answer(case.x)
    return [case.answer(case.again(without(case, i, scaling, config))) - before for i in ids]


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    found, truth = done["influence"], truth_of(config, done)
    predicted = np.array(found["full"])
    return [
        correlation("pearson", predicted, truth, threshold=0.60, paper=PAPER),
        *two_figures(predicted, truth),
        Gate("accuracy on the test images", found["accuracy"]["test"]),
        Gate("lowest eigenvalue of pretraining's Hessian", found["lowest"][0]),
    ]


def truth_of(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> np.ndarray:
    return np.concatenate([done[cell]["truth"] for cell in pieces(config)])


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw predicted against true rises, the two halves of the sample apart."""
    predicted, truth = np.array(done["influence"]["full"]), truth_of(config, done)
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, 2), sides(len(truth)).items(), strict=True):
        r = stats.pearsonr(predicted[rows], truth[rows]).statistic
        scatter(axes, predicted[rows], truth[rows], f"{name}: r = {r:.2f}")
    save(figure, folder, "left-out")
    draw_worst(config, done["worst"]["found"], folder)


def draw_worst(config: dict[str, Any], found: list[dict[str, Any]], folder: str) -> None:
    """Draw each misclassified test image before the pretraining images that harm it most."""
    with np.load(ROOT / config["stages"]["data"]) as data:
        pixels, labels = data["images"], data["labels"]
    figure = Figure(figsize=(7, 1.3 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 1 + SHOWN, squeeze=False)
    for line, one in zip(grid, found, strict=True):
        for axes, place in zip(line, [one["test"], *one["harmful"]], strict=True):
            axes.imshow(pixels[place], cmap="gray_r")
            axes.set_title(f"{'test' if axes is line[0] else 'pretraining'}: {labels[place]}", fontsize=8)
            axes.axis("off")
    save(figure, folder, "worst")


EXPERIMENT = Experiment(
    name="multistage.fixed",
    claim="Influence of a pretraining image through a fixed embedding against leaving it out of both stages (MNIST)",
    minutes=25,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
