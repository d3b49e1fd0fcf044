"""fastif.simulatability: do influential examples tell what the model will say? (FastIF, appendix C.1, figure 11)

A simulator learns from the predictions of the task model in the place of the labels. For a review of the test set it takes
one step on one training example, under its true label, and its loss on what the task model says of the review is compared
before and after: along 50 learning rates, for the most helpful and the most harmful examples and for random ones of either
label. Task model and simulator are heads on sentence embeddings; influence is the simulator's own, exact
for its λ. Every kind is judged at the learning rate that is best for it, the mean over its queries.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from engine.influence import per_example_loo
from engine.metrics import bootstrap_interval
from launch.experiments.fastif_guard import guarded, pearson
from launch.experiments.fastif_head import convex, is_right, random_of_label, right_and_wrong
from launch.experiments.heads import Head, LogisticOperator, as_model, as_weights, fit, gradients, losses_of, with_one
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part

COLOURS = {"helpful": "#0b6e4f", "harmful": "#c8553d", "random, label 0": "#888888", "random, label 1": "#bbbbbb"}


def cells(config: dict[str, Any]) -> list[str]:
    return ["head"]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the change of the simulator's loss by kind, query, example and learning rate, and how often it agrees."""
    task = convex(config["head"])
    simulator = simulator_of(task.head)
    test = task.head.queries
    right = is_right(task, test)
    chosen = right_and_wrong(right, config["queries"])
    said = predicted(task.head, test)
    queries = Part(test.inputs, said).take(chosen)
    asked, own = gradients(simulator, queries).T.contiguous(), gradients(simulator, simulator.train)
    identity = torch.eye(len(asked), dtype=torch.float64)
    matrix = LogisticOperator(replace(simulator, l2=0.0)).apply(identity)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    solved = torch.linalg.solve(matrix + config["damping"] * largest * identity, asked)
    scores = per_example_loo(own @ solved, len(own))
    rates = torch.logspace(*config["rates"], dtype=torch.float64)
    kinds = picks(scores, task.head.train.labels, config["points"], config["seed"])
    changes = {kind: steps(simulator, task.head.train, queries, ids, rates) for kind, ids in kinds.items()}
    return {
        "right": right[chosen].tolist(),
        "rates": rates.tolist(),
        "alike": pearson(own @ asked, scores),
        "agrees": float((predicted(simulator, test) == said).double().mean()),
        **summary({kind: found.numpy() for kind, found in changes.items()}, right[chosen].numpy()),
    }


def predicted(head: Head, part: Part) -> Tensor:
    return (with_one(part) @ as_weights(head.model).T).argmax(1)


def simulator_of(head: Head) -> Head:
    """Return a head that was trained on what this one says of its own training reviews."""
    train = Part(head.train.inputs, predicted(head, head.train))
    return Head(train, head.queries, as_model(fit(train, head.l2)), head.l2)


def picks(scores: Tensor, labels: Tensor, points: int, seed: int) -> dict[str, Tensor]:
    """Return by kind the training examples of every query, [Q, points]."""
    order = scores.argsort(dim=0, descending=True, stable=True).T
    random = {
        f"random, label {label}": torch.stack([
            random_of_label(labels, label, points, seed, query) for query in range(len(order))
        ])
        for label in (0, 1)
    }  # fmt: skip
    return {"helpful": order[:, :points], "harmful": order.flip(1)[:, :points]} | random


def steps(simulator: Head, train: Part, queries: Part, ids: Tensor, rates: Tensor) -> Tensor:
    """Return the change of each query's loss after a step on one example under its true label, [Q, points, rates]."""
    before = losses_of(queries, as_weights(simulator.model)[None])[0]
    found = []
    for q, own in enumerate(ids):
        x = with_one(train.take(own))
        p = (x @ as_weights(simulator.model).T).softmax(1)
        slope = (p - torch.nn.functional.one_hot(train.labels[own], 2))[:, :, None] * x[:, None]  # [points, 2, D]
        moved = as_weights(simulator.model) - rates[:, None, None] * slope[:, None]  # [points, rates, 2, D]
        after = losses_of(queries.take(torch.tensor([q])), moved.flatten(0, 1)).view(len(own), len(rates))
        found.append(after - before[q])
    return torch.stack(found)


def summary(changes: dict[str, np.ndarray], right: np.ndarray) -> dict[str, Any]:
    """Return, of changes [Q, points, rates] by kind, what is judged and drawn.

    `best`: each query's change, a mean over examples, at the rate that is best for its kind over all queries. `curves`: means
    over the queries answered right and wrong, [points, rates].
    """
    best, curves = {}, {}
    for kind, found in changes.items():
        means = found.mean(1)
        best[kind] = rounded(means[:, means.mean(0).argmin()])
        curves[kind] = {side: [rounded(one) for one in found[rows].mean(0)] for side, rows in sides(right).items()}
    return {"best": best, "curves": curves}


def sides(right: np.ndarray) -> dict[str, np.ndarray]:
    return {"right": right, "wrong": ~right}


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge by a sign test whether helpful examples lower the simulator's loss more than random ones; report all kinds."""
    result = done["head"]
    best = {kind: np.array(found) for kind, found in result["best"].items()}
    random = (best["random, label 0"] + best["random, label 1"]) / 2
    wins = int((best["helpful"] < random).sum())
    test = stats.binomtest(wins, len(random), alternative="greater")
    judged = [
        Gate("sign test, helpful below random at the best rate: p", float(test.pvalue), threshold=0.05, at_least=False)
    ]
    return [
        *guarded(judged, config["damping"], result["alike"]),
        Gate("queries where helpful is below random", wins / len(random)),
        *(Gate(f"change of the simulator's loss, {kind}", float(found.mean()), bootstrap_interval(found))
          for kind, found in best.items()),
        Gate("test reviews that the simulator answers as the task model", result["agrees"]),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the change against the learning rate: mean over queries, band from the least to the largest example."""
    result = done["head"]
    counts = {side: int(rows.sum()) for side, rows in sides(np.array(result["right"])).items()}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (side, count) in zip(figure.subplots(1, 2, sharey=True), counts.items(), strict=True):
        axes.axhline(0, color="#dddddd", linewidth=0.8)
        for kind, colour in COLOURS.items():
            found = np.array(result["curves"][kind][side])
            axes.fill_between(result["rates"], found.min(0), found.max(0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(result["rates"], found.mean(0), color=colour, label=kind)
        axes.set(xscale="log", xlabel="learning rate of the step")
        axes.set_title(f"{count} reviews whose prediction is {side}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(*np.array([-1.3, 1.3]) * max(abs(np.mean(found)) for found in result["best"].values()))
    figure.supylabel("change of the simulator's loss", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, folder, "simulatability")


EXPERIMENT = Experiment(
    name="fastif.simulatability",
    claim="A step on the most helpful example tells a simulator more about the model's answer than a random one",
    minutes=2,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
