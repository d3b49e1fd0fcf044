"""multistage.similarity: is influence larger where fine-tuning is like pretraining? (Chen et al. 2020, section 4.3, figure 5)

One network is pretrained on digits 0 to 3; its embedding is kept for two tasks of like size and settings: A the same digits,
other images, B four other digits. Influence of every pretraining image on the summed loss of the test images. Reported beside
the two exact inverses: the paper's damped squared systems, no inverse at all, other digits for B, and |I| by the tasks' test
losses, as a task with a larger loss has a larger gradient too.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from engine.multistage import Inverse
from launch.experiments.multistage_digits import accuracy
from launch.experiments.multistage_plots import histogram, mean_ratio
from launch.experiments.multistage_solvers import filtered
from launch.experiments.multistage_stages import fixed_case, fixed_parts
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

PAPER, EXACT = 2.2, "exact"


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["tasks"])


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return I of every pretraining image on one task's test images, by the inverses."""
    case = fixed_case(config | {"stages": config["stages"] | {"finetuning": config["tasks"][cell]}})
    squared = {"solver": "squared-cg", "damping": config["dampings"]}
    inverses: dict[str, tuple[Inverse, Inverse]] = {
        EXACT: (case.finetuning.inverse, case.pretraining.inverse),
        "damped squared": (filtered(squared, "finetuning", case.finetuning, {}),
                           filtered(squared, "pretraining", case.pretraining, {})),
        "no inverse": (torch.clone, torch.clone),
    }  # fmt: skip
    return {
        "influence": {
            name: [float(f"{value:.4g}") for value in case.influence(fixed_parts(case, *pair)).tolist()]
            for name, pair in inverses.items()
        },
        "accuracy": accuracy(case.joint, case.x, case.test),
        "loss": case.answer(case.x) / len(case.test),
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge A against B by the exact inverses."""
    first, second, *others = config["tasks"]

    def ratio(name: str, task: str, inverse: str = EXACT, by_loss: bool = False, **asked: Any) -> Gate:
        scale = {key: one["loss"] if by_loss else 1.0 for key, one in done.items()}
        a, b = (np.abs(done[key]["influence"][inverse]) / scale[key] for key in (first, task))
        return mean_ratio(name, a, b, **asked)

    return [
        ratio("mean |I| of A to B", second, threshold=1.5, paper=PAPER),
        *(ratio(f"mean |I| of A to B, {name}", second, name) for name in done[first]["influence"] if name != EXACT),
        ratio("mean |I| of A to B, by the test loss", second, by_loss=True),
        *(ratio(f"mean |I| of A to {other}{ending}", other, name)
          for other in others
          for name, ending in ((EXACT, ""), ("damped squared", ", damped squared"))),
        *(Gate(f"mean |I|, {task}", float(np.abs(done[task]["influence"][EXACT]).mean())) for task in done),
        *(Gate(f"accuracy on the test images, {task}", done[task]["accuracy"]) for task in done),
        *(Gate(f"loss of a test image, {task}", done[task]["loss"]) for task in done),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    names = {"A": "A, the same digits", "B": "B, other digits"}
    histogram(
        figure.subplots(), {names[task]: np.array(done[task]["influence"][EXACT]) for task in names},
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
