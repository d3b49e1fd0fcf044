"""tracin.mislabel: does self-influence find wrong labels? The mislabelling experiment of TracIn (Pruthi et al. 2020), on MNIST.

A model trained on clean labels says, for every digit, which wrong class it finds most likely. A tenth of the training
digits gets that label, a fresh model is trained on the lot, and the training digits are ranked by TracInCP self-influence
Σ_i η_i ‖∇ℓ(w_i, z)‖² from exact norms. A cell is one seed: its own initial weights, order and flips.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from engine.batches import Batch
from engine.counters import derive_key, permutation
from engine.gradients import PerExampleGradients
from engine.methods.contract import QueryState, Rows
from engine.methods.tracin import TracIn
from engine.metrics import auroc, bootstrap_interval, found_in_top
from engine.models import ready_for_scoring
from engine.parameters import select_parameters
from engine.projection import Projection
from engine.projectors import make_projector
from engine.training import TrainSettings, train
from launch.experiments.registry import Experiment, Gate

CLASSES = 10
CHECKED = 0.2  # share of the training set that one looks through
GRID = np.linspace(0, 1, 51)  # of the curves
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


def cells(config: dict[str, Any]) -> list[str]:
    return [f"seed-{seed}" for seed in config["seeds"]]


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Flip, train, rank; return AUROC, share found, curves and accuracies of one seed."""
    seed = int(cell.removeprefix("seed-"))
    parts = read_digits(config)
    images, clean = parts["train"]
    clean_model = states_by_epoch(config, images, clean, derive_key(seed, "clean") % 2**31)[-1]
    labels, flipped = flip_labels(logits_of(config, clean_model, images), clean, config["flipped"], seed)
    states = states_by_epoch(config, images, labels, derive_key(seed, "flipped") % 2**31)
    losses = [mean_loss(config, state, images, labels) for state in states]
    chosen = choose_checkpoints(losses, config["checkpoints"])
    scores = scores_of(config, [states[i] for i in chosen], images, labels, seed)
    return {
        "epochs": [i + 1 for i in chosen],
        "losses": [round(loss, 4) for loss in losses],
        "auroc": {name: auroc(score, flipped) for name, score in scores.items()},
        "found": {name: found_in_top(score, flipped, CHECKED) for name, score in scores.items()},
        "curves": {
            name: [round(found_in_top(score, flipped, share), 4) for share in GRID] for name, score in scores.items()
        },
        "accuracy": {
            f"{kind} {part}": accuracy(config, state, *parts[part])
            for kind, state in (("clean", clean_model), ("flipped", states[-1]))
            for part in ("dev", "test")
        },
    }


def read_digits(config: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pixels in [0, 1] [n, 784] and labels of the three parts, in file order; the parts are disjoint."""
    with np.load(Path(__file__).resolve().parents[2] / config["data"]) as data:
        images = torch.from_numpy(data["images"]).flatten(1).float() / 255
        labels = torch.from_numpy(data["labels"]).long()
    bounds, begin = {}, 0
    for name in ("train", "dev", "test"):
        bounds[name] = slice(begin, begin + config["rows"][name])
        begin += config["rows"][name]
    return {name: (images[part], labels[part]) for name, part in bounds.items()}


def flip_labels(logits: Tensor, labels: Tensor, share: float, seed: int) -> tuple[Tensor, np.ndarray]:
    """Return labels of which a random share became the highest-scoring wrong class, and which ones those are."""
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[permutation(derive_key(seed, "flips"), len(labels))[: round(share * len(labels))]] = True
    wrong = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    return torch.where(torch.from_numpy(flipped), wrong, labels), flipped


def choose_checkpoints(losses: Sequence[float], count: int) -> list[int]:
    """Return the positions of `count` epoch ends, spread over the region of steady decrease: TracIn appendix D as a rule.

    Only the mean training loss after each epoch is looked at. The decrease from the first epoch end to the lowest loss
    is cut at 95 % (what follows has converged) and divided into `count` equal parts; the first epoch end in which a part
    is complete is taken. So the checkpoints are denser where the loss falls faster, the noisy start is never among
    them, and neither is an epoch that raised the loss. Raises ValueError if there are too few epochs for that.
    """
    best = np.minimum.accumulate(losses)
    lows = [i for i in range(1, len(losses)) if losses[i] < best[i - 1]]
    levels = best[0] - 0.95 * (best[0] - best[-1]) * np.arange(1, count + 1) / count
    chosen: list[int] = []
    for level in levels:
        open_ = [i for i in lows if losses[i] <= level and (not chosen or i > chosen[-1])]
        if not open_:
            raise ValueError(f"{len(losses)} epochs are too few for {count} checkpoints: raise train.epochs")
        chosen.append(open_[0])
    return chosen


def scores_of(
    config: dict[str, Any], states: list[dict[str, Tensor]], images: Tensor, labels: Tensor, seed: int
) -> dict[str, np.ndarray]:
    """Return every ranking's scores of all training digits, higher = more suspect."""
    n = len(labels)
    method, total, loss_total = TracIn(), np.zeros(n), np.zeros(n)
    for state in states:
        rows, losses = gradient_rows(config, state, images, labels)
        loss_total += losses
        total += config["train"]["learning_rate"] * self_influence(method, rows)
    return {
        "tracin": total,
        "loss": losses,
        "mean_loss": loss_total / len(states),  # what TracIn must beat: it sees the same checkpoints
        "last_norm": np.sqrt(self_influence(method, rows)),
        "cosine": np.ones(n),  # ∇·∇ / (‖∇‖ ‖∇‖): the unit norm takes away the very thing that tells
        "random": permutation(derive_key(seed, "random"), n).astype(np.float64),
    }


def gradient_rows(
    config: dict[str, Any], state: dict[str, Tensor], images: Tensor, labels: Tensor
) -> tuple[Rows, np.ndarray]:
    """Return the gradient rows with exact norms, and the losses, of every training digit under one checkpoint."""
    model = ready_for_scoring(load(config, state), torch.device("cpu"), torch.float32)
    parameters = select_parameters(model, ["*"])
    projector = make_projector(parameters, Projection(), torch.device("cpu"), torch.float32)
    with PerExampleGradients(model, parameters, projector, norms=True) as gradients:
        parts = [gradients(loss, digits(images, labels, rows)) for rows in torch.arange(len(labels)).split(1000)]
    assert all(part.norms is not None for part in parts)
    return Rows(
        torch.cat([p.ids for p in parts]),
        {name: torch.cat([p.arrays[name] for p in parts]) for name in projector.layout.arrays},
        torch.cat([p.norms for p in parts if p.norms is not None]),
        tuple(p.name for p in parameters),
    ), torch.cat([p.losses for p in parts]).numpy()


def self_influence(method: TracIn, rows: Rows) -> np.ndarray:
    """Return ‖∇‖² of every row as the method itself gives it beside its scores (of no query here)."""
    nothing = {name: array[:0] for name, array in rows.arrays.items()}
    state = QueryState(nothing, None, torch.zeros(0, dtype=torch.float64), 1.0, tuple(range(len(rows.parameters))))
    squares = method.score(rows, state).self_influence
    assert squares is not None
    return squares.numpy()


def states_by_epoch(config: dict[str, Any], images: Tensor, labels: Tensor, seed: int) -> list[dict[str, Tensor]]:
    """Train a fresh model by plain SGD at a constant rate and return its weights after every epoch."""
    torch.manual_seed(seed)
    model = mlp(config)
    settings = TrainSettings(**config["train"], optimizer="sgd", checkpoints=1, seed=seed)
    per_epoch = -(-len(labels) // settings.batch_size)

    def collate(rows: list[int]) -> Batch:
        return digits(images, labels, torch.tensor(rows))

    return [
        {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        for step in train(model, loss, collate, list(range(len(labels))), settings)
        if step.step % per_epoch == 0
    ]


def mlp(config: dict[str, Any]) -> nn.Sequential:
    sizes = [784, *config["widths"], CLASSES]
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def load(config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    model = mlp(config)
    model.load_state_dict(state)
    return model


def digits(images: Tensor, labels: Tensor, rows: Tensor) -> Batch:
    return Batch(rows, {"pixels": images[rows], "target": labels[rows]})


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["pixels"]), batch["target"], reduction="none")


def logits_of(config: dict[str, Any], state: dict[str, Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return load(config, state)(images)


def mean_loss(config: dict[str, Any], state: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits_of(config, state, images), labels))


def accuracy(config: dict[str, Any], state: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    return float((logits_of(config, state, images).argmax(1) == labels).double().mean())


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge TracIn's two figures, means over seeds; report those of the other rankings, and the models' accuracy."""

    def mean(label: str, key: str, name: str, threshold: float | None = None) -> Gate:
        values = np.array([result[key][name] for result in done.values()])
        return Gate(label, float(values.mean()), bootstrap_interval(values), threshold)

    others = [name for name in SCORES if name != "tracin"]
    return [
        mean("auroc", "auroc", "tracin", threshold=0.85),
        mean("found in 20 %", "found", "tracin", threshold=0.60),
        *(mean(f"auroc, {SCORES[name]}", "auroc", name) for name in others),
        *(mean(f"found in 20 %, {SCORES[name]}", "found", name) for name in others),
        *(
            mean(f"accuracy on {part}, trained on {kind} labels", "accuracy", f"{kind} {part}")
            for kind in ("clean", "flipped")
            for part in ("dev", "test")
        ),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the share of flipped labels found against the share of digits checked: mean and range over the seeds."""
    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.subplots()
    axes.axvline(CHECKED, color="#bbbbbb", linewidth=0.8, linestyle=":")
    for name in SCORES:
        curves = np.array([result["curves"][name] for result in done.values()])
        axes.fill_between(GRID, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.plot(GRID, curves.mean(0), color=COLOURS[name], linewidth=2 if name == "tracin" else 1.3)
    name_curves(axes, done)
    axes.set(
        xlim=(0, 1), ylim=(0, 1.02), xlabel="share of training digits checked", ylabel="share of wrong labels found"
    )
    title = f"{config['flipped']:.0%} wrong labels among {config['rows']['train']:,} MNIST digits"
    axes.set_title(f"{title} (line: mean, band: range over {len(done)} seeds)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    for kind in ("png", "svg"):
        figure.savefig(Path(folder) / f"found.{kind}", dpi=150)


def name_curves(axes: Axes, done: dict[str, dict[str, Any]]) -> None:
    """Write every curve's name in its own colour, best first, with what it finds at the dotted line."""
    found = {name: np.mean([result["found"][name] for result in done.values()]) for name in SCORES}
    axes.text(0.52, 0.41, f"found at {CHECKED:.0%} checked:", color="#555555", fontsize=9)
    for line, name in enumerate(sorted(SCORES, key=lambda name: -found[name]), start=1):
        text = f"{found[name]:.0%}  {SCORES[name]}"
        axes.text(0.52, 0.41 - 0.055 * line, text, color=COLOURS[name], fontsize=9)


EXPERIMENT = Experiment(
    name="tracin.mislabel",
    claim="TracIn self-influence finds wrong labels: 10 % of 7,000 MNIST digits flipped to the likeliest wrong class",
    minutes=2,
    cells=cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
