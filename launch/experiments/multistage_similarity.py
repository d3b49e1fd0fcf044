"""multistage.similarity: is influence larger where fine-tuning is like pretraining? (Chen et al. 2020, section 4.3, figure 5)

One network is pretrained on digits 0 to 3; its embedding is kept for two tasks of like size and settings: A the same digits,
other images, B four other digits. Influence of every pretraining image on the summed loss of the test images.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from launch.experiments.multistage_digits import accuracy
from launch.experiments.multistage_plots import histogram, mean_ratio
from launch.experiments.multistage_stages import fixed_case, fixed_parts
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

PAPER = 2.2


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["tasks"])


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return I of every pretraining image on one task's test images."""
    case = fixed_case(config | {"stages": config["stages"] | {"finetuning": config["tasks"][cell]}})
    influence = case.influence(fixed_parts(case, case.finetuning.inverse, case.pretraining.inverse))
    return {
        "influence": [float(f"{value:.6g}") for value in influence.tolist()],
        "accuracy": accuracy(case.joint, case.x, case.test),
        "loss": case.answer(case.x) / len(case.test),
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    a, b = (np.abs(done[task]["influence"]) for task in config["tasks"])
    return [
        mean_ratio("mean |I| of A to B", a, b, threshold=1.5, paper=PAPER),
        *(Gate(f"mean |I|, {task}", float(np.abs(done[task]["influence"]).mean())) for task in done),
        *(Gate(f"accuracy on the test images, {task}", done[task]["accuracy"]) for task in done),
        *(Gate(f"loss of a test image, {task}", done[task]["loss"]) for task in done),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    names = {"A": "A, the same digits", "B": "B, other digits"}
    histogram(
        figure.subplots(), {names[task]: np.array(done[task]["influence"]) for task in done},
        "I(z, test set): positive does harm",
    )  # fmt: skip
    save(figure, folder, "similarity")


EXPERIMENT = Experiment(
    name="multistage.similarity",
    claim="Pretraining images have more influence where fine-tuning is like pretraining (MNIST)",
    minutes=6,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
