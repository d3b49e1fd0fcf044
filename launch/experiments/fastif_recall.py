"""fastif.recall: are the influential examples among the query's nearest neighbours? (FastIF, Guo et al. 2021, appendix B.1)

The truth is the exact influence of all training examples: none of it is estimated. Recall@m is the share of the m
strongest that are among the k nearest, for the strongest of either sign (gates), the most helpful and the most harmful;
k is the paper's share of the training set. On a convex head and on MiniLM's top two layers; there, beside the pooled
output of the paper, neighbours are sought by other features too, which are reported alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.metrics import bootstrap_interval
from launch.experiments import fastif_head, fastif_minilm
from launch.experiments.fastif_choice import choose
from launch.experiments.fastif_guard import guarded, pearson
from launch.experiments.fastif_head import nearest, right_and_wrong
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part

SIDES = {"influential": torch.abs, "helpful": torch.positive, "harmful": torch.neg}
FEATURES = "features"
COLOURS = {"influential": "#222222", "helpful": "#0b6e4f", "harmful": "#c8553d"}


@dataclass(frozen=True)
class Asked:
    """The queries of one subject with their exact influence."""

    right: list[bool]  # whether the model gets the query right
    scores: Tensor  # [N, Q] float64, positive: helpful
    identity: Tensor  # [N, Q], the same with no curvature
    near: np.ndarray  # [Q, k] positions of the nearest, nearest first
    damping: float  # λ
    largest: float  # λ_max


def cells(config: dict[str, Any]) -> list[str]:
    return [*config["queries"], FEATURES]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return every query's recall by side, m and k, with the guard's two figures; or by MiniLM's features, m and k."""
    if cell == FEATURES:
        return {"recall": by_features(config)}
    asked = ASK[cell](config)
    return {
        "right": asked.right,
        "examples": len(asked.scores),
        "relative_damping": asked.damping / asked.largest,
        "alike": pearson(asked.identity, asked.scores),
        "recall": {
            side: {str(m): recalls(of(asked.scores), asked.near, m, config["neighbours"]) for m in config["strongest"]}
            for side, of in SIDES.items()
        },
    }


def ask_head(config: dict[str, Any]) -> Asked:
    subject = fastif_head.convex(config["head"])
    test = subject.head.queries
    right = fastif_head.is_right(subject, test)
    chosen = right_and_wrong(right, config["queries"]["head"])
    queries = test.take(chosen)
    asked = fastif_head.asked_gradients(subject, queries)
    return Asked(
        right[chosen].tolist(),
        subject.influence(subject.solve(asked, subject.head.l2)),
        subject.influence(asked),
        nearest(fastif_head.embeddings(subject.head.train), fastif_head.embeddings(queries), max(config["neighbours"])),
        subject.head.l2,
        subject.largest,
    )


def ask_minilm(config: dict[str, Any]) -> Asked:
    subject = fastif_minilm.trained(config["minilm"])
    queries, right = minilm_queries(config)
    exact = fastif_minilm.reference(config["minilm"], config["curvature_rows"])
    asked = fastif_minilm.query_gradients(subject, queries)
    damping = choose(config)["damping"] * exact.largest
    both = fastif_minilm.influence_on(subject, torch.cat([exact.solve(asked, damping), asked], 1))
    scores, identity = both.split(len(right), dim=1)
    features = [fastif_minilm.pooled(subject, part) for part in (subject.train, queries)]
    near = nearest(features[0], features[1], max(config["neighbours"]))
    return Asked(right, scores, identity, near, damping, exact.largest)


def minilm_queries(config: dict[str, Any]) -> tuple[Part, list[bool]]:
    """Return the queries, and whether the model gets them right."""
    subject = fastif_minilm.trained(config["minilm"])
    test = subject.subject.parts["test"]
    right = fastif_minilm.is_right(subject, test)
    chosen = right_and_wrong(right, config["queries"]["minilm"])
    return test.take(chosen), right[chosen].tolist()


def by_features(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the recall of the influential by what neighbours are sought by, m and k."""
    subject, (queries, _) = fastif_minilm.trained(config["minilm"]), minilm_queries(config)
    exact = fastif_minilm.reference(config["minilm"], config["curvature_rows"])
    solved = exact.solve(fastif_minilm.query_gradients(subject, queries), choose(config)["damping"] * exact.largest)
    strength = fastif_minilm.influence_on(subject, solved).abs()
    train, asked = (fastif_minilm.features(subject, part) for part in (subject.train, queries))
    near = {name: nearest(train[name], asked[name], max(config["neighbours"])) for name in train}
    return {
        name: {str(m): recalls(strength, rows, m, config["neighbours"]) for m in config["strongest"]}
        for name, rows in near.items()
    }


ASK = {"head": ask_head, "minilm": ask_minilm}
NOUNS = {"head": "a logistic head on sentence embeddings", "minilm": "MiniLM's top two layers"}


def recalls(scores: Tensor, near: np.ndarray, m: int, neighbours: list[int]) -> dict[str, list[float]]:
    """Return by k the share of each query's m highest scores [N, Q] that is among its k nearest."""
    top = scores.argsort(dim=0, descending=True, stable=True)[:m].T.numpy()
    return {
        str(k): [float(np.isin(strongest, row[:k]).mean()) for strongest, row in zip(top, near, strict=True)]
        for k in neighbours
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge recall@100 of the influential at two sizes of the neighbourhood; report the other curves' points there."""
    found = [gate for name in config["queries"] for gate in gates_of(config, name, done[name])]
    total = done["minilm"]["examples"]
    for name, recall in done[FEATURES]["recall"].items():
        for one in config["judged"]:
            k, values = one["neighbours"], np.array(recall["100"][str(one["neighbours"])])
            title = f"neighbours by {name}: recall@100 at {100 * k / total:.1f} %, minilm"
            found.append(Gate(title, float(values.mean()), bootstrap_interval(values)))
    return found


def gates_of(config: dict[str, Any], name: str, result: dict[str, Any]) -> list[Gate]:
    right = np.array(result["right"])

    def mean(label: str, side: str, m: int, k: int, rows: Any = slice(None), **asked: Any) -> Gate:
        values = np.array(result["recall"][side][str(m)][str(k)])[rows]
        share = f"{100 * k / result['examples']:.1f} %"
        return Gate(f"{label}recall@{m} at {share}, {name}", float(values.mean()), bootstrap_interval(values), **asked)

    judged = [mean("", "influential", 100, one["neighbours"], threshold=one["least"], paper=one["paper"])
              for one in config["judged"]]  # fmt: skip
    found = guarded(judged, result["relative_damping"], result["alike"])
    found = [gate if "recall" in gate.name else renamed(gate, name) for gate in found]
    k = config["judged"][0]["neighbours"]
    groups = [
        (side, kind, rows) for side in ("helpful", "harmful") for kind, rows in (("right", right), ("wrong", ~right))
    ]
    return [
        *found,
        *(mean("", "influential", 10, one["neighbours"]) for one in config["judged"]),
        *(mean(f"{side}, {kind} predictions: ", side, 100, k, rows) for side, kind, rows in groups),
    ]


def renamed(gate: Gate, name: str) -> Gate:
    return Gate(f"{gate.name}, {name}", gate.value, gate.ci, gate.threshold, gate.at_least)


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw recall against the share of the training set that is kept, as the paper's figure 8."""
    asked = {name: done[name] for name in config["queries"]}
    figure = Figure(figsize=(5.2 * len(asked), 4.2), layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(asked), squeeze=False)[0], asked.items(), strict=True):
        shares = np.array(config["neighbours"]) / result["examples"]
        for side, colour in COLOURS.items():
            for m, style in zip(config["strongest"], (":", "-"), strict=True):
                curve = [np.mean(result["recall"][side][str(m)][str(k)]) for k in config["neighbours"]]
                axes.plot(shares, curve, style, color=colour, marker=".", label=f"{m} most {side}")
        axes.plot(shares, shares, color="#aaaaaa", linewidth=1, label="random")
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="nearest neighbours kept, share of the training set")
        axes.set_xticks(shares, [f"{share:.1%}" for share in shares])
        axes.minorticks_off()
        axes.set_title(f"recall on {NOUNS[name]}, {len(result['right'])} queries", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, folder, "recall")


EXPERIMENT = Experiment(
    name="fastif.recall",
    claim="A query's nearest neighbours hold its influential training examples: a convex head and MiniLM, 8,000 reviews",
    minutes=25,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
