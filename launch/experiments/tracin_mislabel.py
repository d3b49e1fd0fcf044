"""tracin.mislabel: does self-influence find wrong labels? The mislabelling experiment of TracIn (Pruthi et al. 2020).

A tenth of the training labels becomes the wrong class that a model trained on clean labels finds most likely (with two
classes: the other one). A fresh model is trained on the lot, and the training examples are ranked by TracInCP
self-influence Σ_i η_i ‖∇ℓ(w_i, z)‖² from exact norms. On MNIST and on movie reviews; a cell is one data set and seed: its
own initial weights, order and flips. Gates without the name of a data set are MNIST's.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine.counters import derive_key, permutation
from engine.metrics import auroc, bootstrap_interval, found_in_top
from engine.projection import Projection
from launch.experiments.passes import chosen_states, gradient_rows, projector_of, self_influence, states_of
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import (
    Part,
    State,
    Subject,
    accuracy,
    logits_of,
    make_subject,
    of_set,
    seeded_cells,
    set_and_seed,
)

CHECKED = 0.2  # share of the training set that one looks through
GRID = np.linspace(0, 1, 51)  # of the curves
NOUNS = {"mnist": "MNIST digits", "movie": "movie reviews"}
# score -> how it is called in gates and plot
SCORES = {
    "tracin": "TracIn self-influence",
    "loss": "training loss, last checkpoint",
    "mean_loss": "training loss, mean of checkpoints",
    "last_norm": "gradient norm, last checkpoint",
    "cosine": "cosine self-influence (always 1)",
    "random": "random",
}
COLOURS = {
    "tracin": "#0b6e4f",
    "loss": "#c8553d",
    "mean_loss": "#d9932f",
    "last_norm": "#3d5a98",
    "cosine": "#8a6fa8",
    "random": "#888888",
}


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Flip, train, rank; return AUROC, share found, curves and accuracies of one data set and seed."""
    name, seed = set_and_seed(cell)
    settings = config["sets"][name]
    subject = make_subject(name, settings)
    models: dict[str, State] = {}
    if subject.classes > 2:
        models["clean"] = states_of(subject, subject.parts["train"], settings["train"], key(seed, "clean"))[-1]
    labels, flipped = flip_labels(subject, models.get("clean"), config["flipped"], seed)
    given = Part(subject.parts["train"].inputs, labels)
    states = states_of(subject, given, settings["train"], key(seed, "flipped"))
    models["flipped"] = states[-1]
    chosen = chosen_states(subject, states, given, config["checkpoints"])
    scores = scores_of(subject, [states[i] for i in chosen], settings["train"]["learning_rate"], given, seed)
    curves = {label: [found_in_top(score, flipped, share) for share in GRID] for label, score in scores.items()}
    return {
        "checkpoints": [i + 1 for i in chosen],
        "auroc": {label: auroc(score, flipped) for label, score in scores.items()},
        "found": {label: found_in_top(score, flipped, CHECKED) for label, score in scores.items()},
        "curves": {label: [round(share, 4) for share in curve] for label, curve in curves.items()},
        "accuracy": {
            f"{kind} {part}": accuracy(subject.load(state), subject.parts[part])
            for kind, state in models.items()
            for part in ("dev", "test")
        },
    }


def key(seed: int, name: str) -> int:
    return derive_key(seed, name) % 2**31


def flip_labels(subject: Subject, clean: State | None, share: float, seed: int) -> tuple[Tensor, np.ndarray]:
    """Return the training labels, of which a random share became the likeliest wrong class, and which ones those are."""
    part = subject.parts["train"]
    flipped = np.zeros(len(part.labels), dtype=bool)
    flipped[permutation(derive_key(seed, "flips"), len(flipped))[: round(share * len(flipped))]] = True
    wrong = 1 - part.labels if clean is None else likeliest_wrong(logits_of(subject.load(clean), part), part.labels)
    return torch.where(torch.from_numpy(flipped), wrong, part.labels), flipped


def likeliest_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def scores_of(subject: Subject, states: list[State], rate: float, part: Part, seed: int) -> dict[str, np.ndarray]:
    """Return every ranking's scores of all training examples, higher = more suspect."""
    n = len(part.labels)
    total, loss_total = np.zeros(n), np.zeros(n)
    for state in states:
        model = subject.load(state)
        rows, losses = gradient_rows(model, part, projector_of(model, Projection()))
        loss_total += losses.numpy()
        total += rate * self_influence(rows)
    return {
        "tracin": total,
        "loss": losses.numpy(),
        "mean_loss": loss_total / len(states),  # what TracIn must beat: it sees the same checkpoints
        "last_norm": np.sqrt(self_influence(rows)),
        "cosine": np.ones(n),  # ∇·∇ / (‖∇‖ ‖∇‖): the unit norm takes away the very thing that tells
        "random": permutation(derive_key(seed, "random"), n).astype(np.float64),
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge TracIn's two figures of each data set, means over seeds; report the other rankings and the accuracies."""
    return [gate for name in config["sets"] for gate in gates_of(name, of_set(name, done))]


def gates_of(name: str, results: list[dict[str, Any]]) -> list[Gate]:
    suffix = "" if name == "mnist" else f" {name}"

    def mean(label: str, figure: str, of: str, threshold: float | None = None) -> Gate:
        values = np.array([result[figure][of] for result in results])
        return Gate(label, float(values.mean()), bootstrap_interval(values), threshold)

    others = [score for score in SCORES if score != "tracin"]
    return [
        mean(f"auroc{suffix}", "auroc", "tracin", threshold=0.85),
        mean(f"found in 20 %{suffix}", "found", "tracin", threshold=0.60),
        *(mean(f"auroc{suffix}, {SCORES[score]}", "auroc", score) for score in others),
        *(mean(f"found in 20 %{suffix}, {SCORES[score]}", "found", score) for score in others),
        *(
            mean(f"accuracy{suffix} on {of.split()[1]}, trained on {of.split()[0]} labels", "accuracy", of)
            for of in results[0]["accuracy"]
        ),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the share of flipped labels found against the share of examples checked: mean and range over the seeds."""
    figure = Figure(figsize=(7 * len(config["sets"]), 5), layout="constrained")
    for axes, (name, settings) in zip(figure.subplots(1, len(config["sets"])), config["sets"].items(), strict=True):
        results = of_set(name, done)
        draw(axes, results)
        title = f"{config['flipped']:.0%} wrong labels among {settings['rows']['train']:,} {NOUNS[name]}"
        axes.set_title(f"{title} (line: mean, band: range over {len(results)} seeds)", loc="left", fontsize=10)
    save(figure, folder, "found", dpi=90)


def draw(axes: Axes, results: list[dict[str, Any]]) -> None:
    axes.axvline(CHECKED, color="#bbbbbb", linewidth=0.8, linestyle=":")
    for name in SCORES:
        curves = np.array([result["curves"][name] for result in results])
        axes.fill_between(GRID, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.plot(GRID, curves.mean(0), color=COLOURS[name], linewidth=2 if name == "tracin" else 1.3)
    name_curves(axes, results)
    axes.set(
        xlim=(0, 1), ylim=(0, 1.02), xlabel="share of training examples checked", ylabel="share of wrong labels found"
    )
    axes.spines[["top", "right"]].set_visible(False)


def name_curves(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Write every curve's name in its own colour, best first, with what it finds at the dotted line."""
    found = {name: np.mean([result["found"][name] for result in results]) for name in SCORES}
    axes.text(0.52, 0.41, f"found at {CHECKED:.0%} checked:", color="#555555", fontsize=9)
    for line, name in enumerate(sorted(SCORES, key=lambda name: -found[name]), start=1):
        text = f"{found[name]:.0%}  {SCORES[name]}"
        axes.text(0.52, 0.41 - 0.055 * line, text, color=COLOURS[name], fontsize=9)


EXPERIMENT = Experiment(
    name="tracin.mislabel",
    claim="TracIn self-influence finds wrong labels: 10 % flipped among 7,000 MNIST digits and 2,000 movie reviews",
    minutes=12,
    cells=seeded_cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
