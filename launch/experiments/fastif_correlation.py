"""fastif.correlation: are fast influence scores those of the exact solve? (FastIF, Guo et al. 2021, appendix B.3, table 4)

MiniLM fine-tuned on movie reviews, its top two layers and head. Fast: LiSSA with one example an iteration, the mean of T
repetitions, on the query's nearest neighbours. Full: the exact inverse of the same curvature, of the rows that LiSSA draws
from. Compared on the neighbours, as in the paper, and on all training examples. LiSSA runs in the span of the rows
(fastif_span.py); some iterations on the whole weights, through the engine's curvature products, are held against that.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from engine.metrics import bootstrap_interval
from engine.solvers import finish
from engine.stochastic_solvers import Lissa, lissa_repetition
from launch.experiments import fastif_minilm as minilm
from launch.experiments import fastif_span as span
from launch.experiments.fastif_choice import choose
from launch.experiments.fastif_guard import agreement, guarded, pearson
from launch.experiments.fastif_head import nearest, right_and_wrong
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate

PAPER = {"pearson": 0.998, "spearman": 0.995, "kendall": 0.969}  # table 4, k = 1,000 against full
LEAST = {"pearson": 0.95, "spearman": 0.95, "kendall": 0.80}


def cells(config: dict[str, Any]) -> list[str]:
    return ["scores", "iterations"]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    return CELLS[cell](config)


def setting(config: dict[str, Any], reference: minilm.Reference) -> Lissa:
    """Return LiSSA's settings as chosen on dev reviews, λ and scale absolute."""
    chosen = choose(config)
    scale, damping = span.batch_scale(reference.gram, 1, config["seed"]), chosen["damping"] * reference.largest
    return Lissa(damping, scale, int(chosen["depth"]), 1, int(chosen["repetitions"]), config["seed"])


def compare_scores(config: dict[str, Any]) -> dict[str, Any]:
    """Return every query's agreement of fast and exact scores, on its nearest neighbours by their number and on all."""
    subject = minilm.trained(config["minilm"])
    reference = minilm.reference(config["minilm"], config["curvature_rows"])
    test = subject.subject.parts["test"]
    right = minilm.is_right(subject, test)
    chosen = right_and_wrong(right, config["queries"])
    queries = test.take(chosen)
    asked = minilm.query_gradients(subject, queries)
    lissa = setting(config, reference)
    inner = span.span_of(reference, asked, lissa.scale)
    solved = span.repetitions(inner, lissa, reference.largest).mean(0)
    exact = reference.solve(asked, lissa.damping)
    vectors = torch.cat([span.expanded(reference, inner, solved, asked), exact, asked], 1)
    fast, full, identity = minilm.influence_on(subject, vectors).split(len(chosen), dim=1)
    features = [minilm.pooled(subject, part) for part in (subject.train, queries)]
    near = nearest(features[0], features[1], max(config["neighbours"]))
    compared = {str(k): [row[:k] for row in near] for k in config["neighbours"]}
    compared["all"] = [np.arange(len(fast))] * len(chosen)
    pairs = list(zip(fast.T.numpy(), full.T.numpy(), strict=True))
    return {
        "right": right[chosen].tolist(),
        "damping": lissa.damping,
        "largest": reference.largest,
        "scale": lissa.scale,
        "chosen": choose(config),
        "alike": pearson(identity, full),
        "alike_fast": pearson(identity, fast),
        "agreement": {
            name: [agreement(a[ids], b[ids]) for (a, b), ids in zip(pairs, rows, strict=True)]
            for name, rows in compared.items()
        },
        "drawn": [
            [[float(f"{score:.4g}") for score in side[:: config["drawn_every"]]] for side in pair] for pair in pairs
        ],
    }


def compare_iterations(config: dict[str, Any]) -> dict[str, Any]:
    """Return how far LiSSA on the whole weights, and the engine's power iteration, are from what the Gram matrix says."""
    subject = minilm.trained(config["minilm"])
    reference = minilm.reference(config["minilm"], config["curvature_rows"])
    query = subject.subject.parts["test"].take(torch.tensor([0]))
    b = minilm.query_gradients(subject, query)
    lissa = replace(setting(config, reference), iterations=config["checked_iterations"], repetitions=1)
    curvature = minilm.operator(subject, reference.rows)
    ids = torch.arange(len(reference.gram))
    whole = finish(lissa_repetition(curvature, b, ids, lissa, 0, reference.largest))
    inner = span.span_of(reference, b, lissa.scale)
    one = span.repetitions(inner, lissa, reference.largest)[0]
    moved = whole - b / lissa.scale * geometric(1 - lissa.damping / lissa.scale, lissa.iterations)
    return {"difference": float((whole - span.expanded(reference, inner, one, b)).norm() / moved.norm())}


def geometric(ratio: float, count: int) -> float:
    """Return 1 + ratio + … + ratio^count: what LiSSA would make of b with no curvature at all."""
    return (1 - ratio ** (count + 1)) / (1 - ratio)


CELLS = {"scores": compare_scores, "iterations": compare_iterations}


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the three correlations on the neighbours and on all examples, means over queries; report other numbers of both."""
    found = done["scores"]

    def mean(of: str, name: str, where: str, judged: bool) -> Gate:
        values = np.array([one[of] for one in found["agreement"][name]])
        least, paper = (LEAST[of], PAPER[of]) if judged else (None, None)
        return Gate(f"{of} {where}", float(values.mean()), bootstrap_interval(values), least, paper=paper)

    candidates = str(config["candidates"])
    others = [str(k) for k in config["neighbours"] if str(k) != candidates]
    judged = [
        mean(of, name, where, judged=True)
        for name, where in ((candidates, f"on {candidates} candidates"), ("all", "on all"))
        for of in LEAST
    ]
    return [
        *guarded(judged, found["damping"] / found["largest"], found["alike"]),
        *(mean(of, name, f"on {name} candidates", judged=False) for name in others for of in LEAST),
        *(Gate(f"chosen on dev: {name}", value) for name, value in found["chosen"].items()),
        Gate("corr(identity, fast)", float(np.mean(found["alike_fast"]))),
        Gate("LiSSA on whole weights against its span, relative difference", done["iterations"]["difference"],
             threshold=1e-3, at_least=False),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw fast against exact scores of every query."""
    found = done["scores"]
    columns = len(found["drawn"]) // 2
    figure = Figure(figsize=(2.2 * columns, 4.8), layout="constrained")
    for axes, right, (fast, full) in zip(
        figure.subplots(2, columns, squeeze=False).ravel(), found["right"], found["drawn"], strict=True
    ):
        ends = [min(full), max(full)]
        axes.plot(ends, ends, color="#aaaaaa", linewidth=0.8)
        axes.plot(full, fast, ".", markersize=2, color="#0b6e4f" if right else "#c8553d")
        axes.set(xticks=[], yticks=[])
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("influence of training examples: exact (across), fast (up); predictions right (upper), wrong (lower)",
                    fontsize=9)  # fmt: skip
    save(figure, folder, "correlation", dpi=110)


EXPERIMENT = Experiment(
    name="fastif.correlation",
    claim="Fast influence scores are those of the exact solve: MiniLM's top two layers and head on 8,000 reviews",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
