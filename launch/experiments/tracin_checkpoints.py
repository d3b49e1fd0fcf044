"""tracin.checkpoints: do checkpoints highlight different classes? (Pruthi et al. 2020, section 4.2 and figure 8)

Trained as in tracin.mislabel: MNIST, a tenth of the labels flipped to the likeliest wrong class. The training digits are
ranked by self-influence η ‖∇ℓ(w, z)‖² at each of three checkpoints alone; counted are the classes (the labels given)
among the top tenth, and, as in the paper's figure, the true classes of the wrong labels found there. A cell is one seed.

The test is χ² for equal class shares at the checkpoints. Much the same digits stand in all three, which makes the counts
more alike than those of independent samples, so its p is too large if anything. Control: which of its checkpoints a digit
was taken at is dealt anew at random.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.counters import derive_key, permutation
from engine.metrics import bootstrap_interval
from engine.projection import Projection
from launch.experiments.passes import chosen_states, gradient_rows, projector_of, self_influence, states_of
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, make_subject
from launch.experiments.tracin_mislabel import flip_labels, key

CLASSES = 10
TOP = 0.1  # share of the training digits that is looked at
CHECKPOINTS = 3
MOST_P = 0.01
COLOURS = ("#7dbd9f", "#2f9470", "#0b4f3a")  # from early to late


def cells(config: dict[str, Any]) -> list[str]:
    return [f"seed-{seed}" for seed in config["seeds"]]


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Flip, train, rank at each checkpoint; return the class counts at each, and the shuffled control's."""
    seed = int(cell.removeprefix("seed-"))
    subject = make_subject("mnist", config)
    clean = subject.parts["train"]
    clean_model = states_of(subject, clean, config["train"], key(seed, "clean"))[-1]
    labels, flipped = flip_labels(subject, clean_model, config["flipped"], seed)
    given = Part(clean.inputs, labels)
    states = states_of(subject, given, config["train"], key(seed, "flipped"))
    chosen = chosen_states(subject, states, given, CHECKPOINTS)
    tops = []
    for i in chosen:
        model = subject.load(states[i])
        rows, _ = gradient_rows(model, given, projector_of(model, Projection()))
        tops.append(np.argsort(-self_influence(rows), kind="stable")[: round(TOP * len(labels))])
    dealt = np.concatenate(tops)[permutation(derive_key(seed, "dealt"), sum(map(len, tops)))]
    return {
        "epochs": [i + 1 for i in chosen],
        "given": [class_counts(labels, top) for top in tops],
        "found": [class_counts(clean.labels, top[flipped[top]]) for top in tops],
        "dealt": [class_counts(labels, top) for top in np.split(dealt, CHECKPOINTS)],
        "in_all": len(set.intersection(*(set(top.tolist()) for top in tops))) / len(tops[0]),
    }


def class_counts(labels: Tensor, rows: np.ndarray) -> list[int]:
    return torch.bincount(labels[torch.from_numpy(rows)], minlength=CLASSES).tolist()


def chi_squared(counts: list[list[int]]) -> tuple[float, float]:
    """Return (p, Cramér's V) of a table of counts [checkpoints, classes]; classes that never occur are left out."""
    table = np.array(counts)
    table = table[:, table.sum(0) > 0]
    statistic, p, _, _ = stats.chi2_contingency(table)
    return float(p), float(np.sqrt(statistic / table.sum() / (min(table.shape) - 1)))


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the largest p of the seeds; report effect sizes, the wrong labels found, and the control."""

    def of(kind: str) -> tuple[np.ndarray, np.ndarray]:
        p, v = zip(*(chi_squared(result[kind]) for result in done.values()), strict=True)
        return np.array(p), np.array(v)

    def largest(name: str, values: np.ndarray, threshold: float | None = None) -> Gate:
        return Gate(name, float(values.max()), bootstrap_interval(values, statistic=np.max), threshold, at_least=False)

    def mean(name: str, values: np.ndarray) -> Gate:
        return Gate(name, float(values.mean()), bootstrap_interval(values))

    (p, v), (found_p, found_v), (dealt_p, dealt_v) = of("given"), of("found"), of("dealt")
    return [
        largest("p between checkpoints, largest of the seeds", p, MOST_P),
        largest("p between checkpoints, wrong labels found, largest of the seeds", found_p),
        mean("p, checkpoints dealt at random", dealt_p),
        mean("Cramér's V between checkpoints", v),
        mean("Cramér's V, wrong labels found", found_v),
        mean("Cramér's V, checkpoints dealt at random", dealt_v),
        mean("share of the top tenth that stands in all three", np.array([r["in_all"] for r in done.values()])),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the class counts at the three checkpoints: all of the top tenth, and the wrong labels found in it."""
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    draw_counts(upper, done, "given")
    upper.set_title("top tenth by self-influence, by given label", loc="left", fontsize=10)
    draw_counts(lower, done, "found")
    lower.set_title("wrong labels found in it, by true class", loc="left", fontsize=10)
    lower.set(xlabel="class", xticks=range(CLASSES))
    names = ("first", "second", "third")
    for place, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        epochs = np.mean([result["epochs"][place] for result in done.values()])
        text = f"{name} checkpoint (epoch {epochs:.0f} on average)"
        upper.text(1, 0.99 - 0.085 * place, text, color=colour, fontsize=9, ha="right", transform=upper.transAxes)
    upper.set_ylim(top=1.35 * upper.get_ylim()[1])
    save(figure, folder, "classes", dpi=150)


def draw_counts(axes: Axes, done: dict[str, dict[str, Any]], kind: str) -> None:
    """Draw mean counts over the seeds, a bar per class and checkpoint, with the range over the seeds."""
    counts = np.array([result[kind] for result in done.values()])  # [seeds, checkpoints, classes]
    for place, colour in enumerate(COLOURS):
        here, middle = counts[:, place], counts[:, place].mean(0)
        where = np.arange(CLASSES) + 0.27 * (place - 1)
        reach = [middle - here.min(0), here.max(0) - middle]
        axes.bar(where, middle, 0.25, color=colour, yerr=reach, error_kw={"elinewidth": 0.7, "ecolor": "#888888"})
    axes.set_ylabel(f"digits (mean and range, {len(counts)} seeds)")
    axes.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    name="tracin.checkpoints",
    claim="Checkpoints highlight different classes: the top tenth of MNIST by self-influence at each of three",
    minutes=3,
    cells=cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
