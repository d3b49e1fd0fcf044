"""multistage.cleansing: does pretraining without the images of most harmful influence help? (Chen et al. 2020, section 4.2)

A tenth of the pretraining labels are wrong. By influence on the summed loss of dev images the most harmful tenth is left out,
or a random tenth, or none; both stages are done again and judged on test images that chose nothing. A cell is one seed: of
the network, the wrong labels and the random tenth. Reported beside the paper's figures, which are CIFAR-10's.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.batches import Batch
from engine.counters import derive_key, permutation, words
from engine.metrics import bootstrap_interval
from engine.minimum import descend, scaling_of, settle
from engine.multistage import fixed
from launch.experiments.multistage_digits import (
    Objective,
    accuracy,
    adam,
    images,
    network,
    on_features,
    places,
    rows_of,
)
from launch.experiments.multistage_stages import started
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

ARMS = ("none", "random", "cleansed")
MORE_ROUNDS = 24  # than the others': wrong labels make the way to the minimum longer under some seeds
PAPER = {"none": 0.5815, "random": 0.5808, "cleansed": 0.5836}


def cells(config: dict[str, Any]) -> list[str]:
    return [f"seed-{seed}" for seed in config["seeds"]]


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return test accuracy and loss of every arm, and how many of the images left out had a wrong label."""
    seed = int(cell.removeprefix("seed-"))
    stages = config["stages"] | {"seed": seed}
    settings, tolerance = stages["pretraining"], stages["tolerance"]
    clean = images(stages, settings["digits"], slice(*settings["rows"]))
    given, wrong = mislabelled(clean, len(settings["digits"]), config["wrong"], seed)
    pretraining = Objective(network(stages, len(settings["digits"]), seed), given, stages["l2"])
    made = settings["adam"]
    x = adam(pretraining, pretraining.weights, made["epochs"], made["batch_size"], made["learning_rate"], seed)
    x, hessian = settle(pretraining, x, settings["steps"], settings["rounds"] + MORE_ROUNDS, tolerance)
    influence = influences(stages, pretraining, x, hessian)
    count = round(config["left_out"] * len(given))
    chosen = {
        "none": np.empty(0, dtype=np.int64),
        "random": permutation(derive_key(seed, "random tenth"), len(given))[:count],
        "cleansed": influence.argsort(descending=True, stable=True)[:count].numpy(),
    }
    scaling, result = scaling_of(hessian), {}
    for arm, rows in chosen.items():
        kept = torch.from_numpy(np.setdiff1d(np.arange(len(given)), rows))
        again = Objective(pretraining.model, rows_of(given, kept), stages["l2"])
        moved, _ = descend(again.slope, x, scaling, config["again_tolerance"], settings["steps"])
        joint, whole = finetuned(stages, pretraining, moved)
        test = images(stages, stages["finetuning"]["digits"], slice(*stages["finetuning"]["test"]))
        result[arm] = {
            "accuracy": accuracy(joint, whole, test),
            "loss": joint.summed(whole, test)[0] / len(test),
            "wrong": float(wrong[rows].mean()) if len(rows) else 0.0,
        }
    return result


def mislabelled(batch: Batch, classes: int, share: float, seed: int) -> tuple[Batch, np.ndarray]:
    """Return the images, a share of which has another class at random, and which ones these are."""
    wrong = np.zeros(len(batch), dtype=bool)
    wrong[permutation(derive_key(seed, "wrong labels"), len(batch))[: round(share * len(batch))]] = True
    shift = 1 + torch.from_numpy(
        (words(derive_key(seed, "wrong class"), 0, len(batch)) % (classes - 1)).astype(np.int64)
    )
    target = torch.where(torch.from_numpy(wrong), (batch["target"] + shift) % classes, batch["target"])
    return Batch(batch.ids, batch.tensors | {"target": target}), wrong


def finetuned(stages: dict[str, Any], pretraining: Objective, x: Tensor) -> tuple[Objective, Tensor]:
    """Return fine-tuning's objective and its (W, Θ), W being what pretraining left."""
    settings = stages["finetuning"]
    train = images(stages, settings["digits"], slice(*settings["train"]))
    joint = Objective(network(stages, len(settings["digits"]), stages["seed"]), train, stages["l2"])
    shared = places(pretraining, joint)
    whole = started(joint, shared, x)
    head = on_features(joint, whole)
    whole[shared.own], _ = settle(head, torch.zeros(head.space.size, dtype=torch.float64), settings["steps"], 5, 1e-8)
    return joint, whole


def influences(stages: dict[str, Any], pretraining: Objective, x: Tensor, hessian: Tensor) -> Tensor:
    """Return I of every pretraining image on the dev images' summed loss, [m]: positive does harm."""
    joint, whole = finetuned(stages, pretraining, x)
    settings, shared = stages["finetuning"], places(pretraining, joint)
    own = on_features(joint, whole).hessian(whole[shared.own])
    dev = images(stages, settings["digits"], slice(*settings["dev"]))
    f = joint.summed(whole, dev)[1][:, None]
    parts = fixed(
        f, lambda b: torch.linalg.solve(own, b), joint.operator(whole), lambda r: torch.linalg.solve(hessian, r), shared
    )
    return pretraining.along(x, parts.whole[:, 0])


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Report every arm, and the paired differences over seeds."""
    found = []
    for figure in ("accuracy", "loss"):
        values = {arm: np.array([result[arm][figure] for result in done.values()]) for arm in ARMS}
        for arm in ARMS:
            paper = PAPER[arm] if figure == "accuracy" else None
            found.append(
                Gate(f"{figure}, {arm}", float(values[arm].mean()), bootstrap_interval(values[arm]), paper=paper)
            )
        for arm in ("none", "random"):
            gain = values["cleansed"] - values[arm]
            found.append(Gate(f"{figure}, cleansed less {arm}", float(gain.mean()), bootstrap_interval(gain)))
    wrong = np.array([result["cleansed"]["wrong"] for result in done.values()])
    return [*found, Gate("share of wrong labels among those left out", float(wrong.mean()), bootstrap_interval(wrong))]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw what every seed gains, by accuracy and loss."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        gains = [
            [result["cleansed"][what] - result[arm][what] for result in done.values()] for arm in ("none", "random")
        ]
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        axes.boxplot(gains, tick_labels=["cleansed − none", "cleansed − random"])
        axes.set_title(f"{what} on the test images, {len(done)} seeds", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "cleansing")


EXPERIMENT = Experiment(
    name="multistage.cleansing",
    claim="Pretraining without the tenth of images of most harmful influence, a tenth of whose labels are wrong (MNIST)",
    minutes=30,
    cells=cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
