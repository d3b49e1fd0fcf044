"""multistage.amount: does more fine-tuning leave pretraining less influence? (Chen et al. 2020, section 4.4, figure 6)

Fine-tuning updates the embedding. C has a third of D's images and a third of its steps; α = 1/(2ηT) follows the steps, so a
part of the fall is that of α: mean |I| of D at C's α is reported beside it.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine.multistage import early_stopping
from launch.experiments.multistage_digits import accuracy
from launch.experiments.multistage_plots import histogram, mean_ratio
from launch.experiments.multistage_stages import updated_case, updated_parts
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

PAPER = {"D": 0.15}  # on CIFAR-10; C's is lost


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["amounts"])


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return I of every pretraining image on the test images after so much fine-tuning."""
    amount = config["amounts"][cell]
    alpha = early_stopping(config["learning_rate"], amount["steps"])
    finetuning = config["stages"]["finetuning"] | {"train": amount["train"]}
    case = updated_case(config | {"stages": config["stages"] | {"finetuning": finetuning}}, alpha)
    influence = case.influence(updated_parts(case, alpha))
    return {
        "influence": [float(f"{value:.6g}") for value in influence.tolist()],
        "alpha": alpha,
        "accuracy": accuracy(case.joint, case.x, case.test),
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    sizes = {name: np.abs(result["influence"]) for name, result in done.items()}
    return [
        mean_ratio("mean |I| of D to C", sizes["D"], sizes["C"], threshold=1.0, at_least=False),
        mean_ratio("mean |I| of D at C's α to C", sizes["D-at-alpha-of-C"], sizes["C"]),
        *(Gate(f"mean |I|, {name}", float(values.mean()), paper=PAPER.get(name)) for name, values in sizes.items()),
        *(Gate(f"accuracy on the test images, {name}", result["accuracy"]) for name, result in done.items()),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    sets = {
        f"{name}, {config['amounts'][name]['train'][1]:,} images": np.array(done[name]["influence"]) for name in "CD"
    }
    histogram(figure.subplots(), sets, "I(z, test set): positive does harm")
    save(figure, folder, "amount")


EXPERIMENT = Experiment(
    name="multistage.amount",
    claim="With three times the fine-tuning, pretraining images have less influence (MNIST, embedding updated)",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
