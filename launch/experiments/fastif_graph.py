"""fastif.graph: which training examples lie behind which mistakes? A circular bipartite graph (FastIF, appendix C.2)

Mistakes of the convex head on movie and on electronics reviews, by what they were taken for, stand on the circle. Inside it
stand the training examples that are near one of them, each pulled towards the mistakes that it influences. Green edges help
(the mistake would be worse without the example), red ones harm. Counted are the edges of each slice and how far two slices
agree on an example: the correlation of its mean influence on either. All of it is in graph.json.
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from launch.experiments.fastif_head import (
    ConvexSubject,
    asked_gradients,
    convex,
    embeddings,
    fast_solution,
    nearest,
    sentence_embeddings,
)
from launch.experiments.heads import as_weights, with_one
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part

HELPS, HARMS = "#0b6e4f", "#c8553d"
COLOURS = ("#3d5a98", "#8a6fa8", "#d9932f", "#5a9bb5")  # of the slices
OUTER, GAP = 1.0, 0.12  # radius of the circle; part of it that stays free between slices


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["slices"])


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return one slice's mistakes, and the candidates of each with their influence."""
    subject = convex(config["head"])
    chosen, queries = mistakes(subject, config, **config["slices"][cell])
    asked = asked_gradients(subject, queries)
    damping = config["damping"] * subject.largest
    scores = subject.influence(fast_solution(subject, asked, damping, config["lissa"], config["seed"]))
    near = nearest(embeddings(subject.head.train), embeddings(queries), config["neighbours"])
    return {
        "queries": chosen,
        "edges": [
            [[int(i), float(f"{scores[i, query]:.4g}")] for i in ids] for query, ids in enumerate(near)
        ],
    }  # fmt: skip


def mistakes(subject: ConvexSubject, config: dict[str, Any], data: str, taken_for: int) -> tuple[list[int], Part]:
    """Return the first test reviews of a data set wrongly taken for this label: their positions, and themselves."""
    whole = subject.head.queries
    if data != config["head"]["data"]:
        own = {name: value for name, value in config["head"].items() if name != "l2"}
        whole = sentence_embeddings(own | {"data": data, "rows": config["other_rows"]})["test"]
    taken = (with_one(whole) @ as_weights(subject.head.model).T).argmax(1)
    found = torch.nonzero((taken == taken_for) & (whole.labels != taken_for)).flatten()[: config["queries"]]
    return found.tolist(), whole.take(found)


def mean_influence(result: dict[str, Any]) -> dict[int, float]:
    """Return every training example's mean influence on the slice's mistakes whose candidate it is."""
    found: dict[int, list[float]] = {}
    for edges in result["edges"]:
        for example, score in edges:
            found.setdefault(example, []).append(score)
    return {example: float(np.mean(scores)) for example, scores in found.items()}


def statistics(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return per slice edge counts and mean strengths by sign, and per pair the correlation and the examples it is over."""
    means = {name: mean_influence(result) for name, result in done.items()}
    slices = {}
    for name, result in done.items():
        scores = np.array([score for edges in result["edges"] for _, score in edges])
        slices[name] = {
            "queries": len(result["queries"]), "edges": len(scores), "helpful": int((scores > 0).sum()),
            "harmful": int((scores < 0).sum()), "mean_helpful": float(scores[scores > 0].mean()) if (scores > 0).any() else 0.0,
            "mean_harmful": float(-scores[scores < 0].mean()) if (scores < 0).any() else 0.0, "examples": len(means[name]),
        }  # fmt: skip
    pairs = {}
    for a in means:
        for b in means:
            shared = sorted(means[a].keys() & means[b].keys())
            of_a, of_b = ([means[one][i] for i in shared] for one in (a, b))
            value = float(np.corrcoef(of_a, of_b)[0, 1]) if len(shared) > 2 else None
            pairs[f"{a} | {b}"] = {"examples": len(shared), "correlation": value}
    return {"slices": slices, "pairs": pairs}


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge that no edge is lost and the correlations are symmetric; report edges and correlations of the slices."""
    found = statistics(done)
    asked = sum(one["queries"] for one in found["slices"].values()) * config["neighbours"]
    edges = sum(one["edges"] for one in found["slices"].values())
    pairs = {name: one["correlation"] for name, one in found["pairs"].items() if one["correlation"] is not None}
    apart = [abs(value - pairs[" | ".join(reversed(name.split(" | ")))]) for name, value in pairs.items()]
    return [
        Gate("edges over queries × k", edges / asked, threshold=1.0),
        Gate("asymmetry of the correlations", max(apart, default=0.0), threshold=1e-12, at_least=False),
        *(Gate(f"{kind} edges, {name}", one[kind]) for name, one in found["slices"].items() for kind in ("helpful", "harmful")),
        *(Gate(f"correlation, {a} and {b}", pairs[f"{a} | {b}"]) for a, b in combinations(done, 2) if f"{a} | {b}" in pairs),
        *(Gate(f"examples, {a} and {b}", found["pairs"][f"{a} | {b}"]["examples"]) for a, b in combinations(done, 2)),
    ]  # fmt: skip


def places(done: dict[str, dict[str, Any]]) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """Return the mistakes' places on the circle, [n, 2] a slice, and each example's: the mean of its own, by |influence|."""
    count, begin = sum(len(result["queries"]) for result in done.values()), 0.0
    outer, pulls = {}, dict[int, list[np.ndarray]]()
    for name, result in done.items():
        share = len(result["queries"]) / count * (2 * np.pi - GAP * len(done))
        angles = begin + share * (np.arange(len(result["queries"])) + 0.5) / max(1, len(result["queries"]))
        begin += share + GAP
        outer[name] = OUTER * np.stack([np.cos(angles), np.sin(angles)], 1)
        for place, edges in zip(outer[name], result["edges"], strict=True):
            for example, score in edges:
                pulls.setdefault(example, []).append(np.array([*(abs(score) * place), abs(score)]))
    totals = {example: np.sum(parts, 0) for example, parts in pulls.items()}
    return outer, {example: 0.9 * total[:2] / max(total[2], 1e-300) for example, total in totals.items()}


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the graph, its strongest edges, and the slices' agreement beside it; write graph.json."""
    outer, inner = places(done)
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, side = figure.subplots(1, 2, width_ratios=(7, 4))
    draw_graph(left, done, outer, inner, config["drawn"])
    draw_pairs(side, done)
    save(figure, folder, "graph", dpi=110)
    nodes = {name: place.round(4).tolist() for name, place in outer.items()}
    examples = {str(example): place.round(4).tolist() for example, place in inner.items()}
    graph = {**statistics(done), "results": done, "places": {"mistakes": nodes, "examples": examples}}
    (Path(folder) / "graph.json").write_text(json.dumps(graph) + "\n")


def draw_graph(
    axes: Axes, done: dict[str, dict[str, Any]], outer: dict[str, np.ndarray], inner: dict[int, np.ndarray], drawn: int
) -> None:
    edges = [(abs(score), score > 0, place, inner[example]) for name, result in done.items()
             for place, own in zip(outer[name], result["edges"], strict=True) for example, score in own]  # fmt: skip
    edges = sorted(edges, key=lambda edge: -edge[0])[:drawn][::-1]
    most = edges[-1][0]
    lines = LineCollection(
        [(a, b) for _, _, a, b in edges],
        colors=[HELPS if helps else HARMS for _, helps, _, _ in edges],
        linewidths=[0.2 + 1.6 * strength / most for strength, *_ in edges],
        alpha=0.35,
    )
    axes.add_collection(lines)
    shown = np.array(list(inner.values()))
    axes.plot(*shown.T, ".", color="#555555", markersize=1.2, alpha=0.5)
    for colour, (name, place) in zip(COLOURS, outer.items(), strict=False):
        axes.plot(*place.T, "o", color=colour, markersize=3)
        x, y = 1.1 * place[len(place) // 2]
        axes.text(
            x,
            y,
            f"{name}\n{len(place)} mistakes",
            color=colour,
            ha="left" if x > 0 else "right",
            va="center",
            fontsize=8,
        )
    axes.set(xlim=(-1.75, 1.75), ylim=(-1.2, 1.2), aspect="equal")
    axes.axis("off")
    axes.set_title(f"{len(inner):,} training examples, their {len(edges):,} strongest edges: helpful green, harmful red",
                   loc="left", fontsize=9)  # fmt: skip


def draw_pairs(axes: Axes, done: dict[str, dict[str, Any]]) -> None:
    """Draw the correlation of every two slices, and over how many shared examples."""
    pairs, names = statistics(done)["pairs"], list(done)
    values = np.array([[pairs[f"{a} | {b}"]["correlation"] for b in names] for a in names], dtype=float)
    axes.imshow(values, cmap="RdYlGn", vmin=-1, vmax=1)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            value, count = pairs[f"{a} | {b}"]["correlation"], pairs[f"{a} | {b}"]["examples"]
            axes.text(
                j, i, f"{'–' if value is None else f'{value:.2f}'}\n{count}", ha="center", va="center", fontsize=8
            )
    axes.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names], fontsize=7)
    axes.set_yticks(range(len(names)), [name.replace("-", "\n", 1) for name in names], fontsize=7)
    axes.set_title(
        "correlation of an example's mean influence\non two slices, over so many shared examples",
        loc="left",
        fontsize=9,
    )


EXPERIMENT = Experiment(
    name="fastif.graph",
    claim="Which training reviews lie behind which mistakes: a bipartite graph of movie and electronics reviews",
    minutes=4,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
