"""tracin.projection: how far may gradients be projected before TracIn's ranking changes? (TracIn appendices E and F)

TracInCP scores from projected gradients are held against the exact ones: per query the Spearman correlation over all
training examples, by kind and size of the projection. Two-sided keeps k × k numbers of every matrix, the dense
Rademacher projection d of the whole gradient. Beside it what the sketch makes of self-influence, whose exact value comes
from exact norms. A cell is one data set and seed, of the training as of the projection.
"""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

from engine.counters import derive_key
from engine.methods.contract import Rows
from engine.methods.tracin import TracIn
from engine.metrics import bootstrap_interval
from engine.projection import Projection
from launch.experiments.passes import (
    chosen_states,
    exact_block,
    gradient_rows,
    projector_of,
    query_state,
    states_of,
)
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, make_subject, of_set, seeded_cells, set_and_seed

COLOURS = {"two-sided": "#0b6e4f", "rademacher": "#d9932f"}
DRAWS = 2000


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Train, score exactly and by every projection; return the correlations of one data set and seed."""
    name, seed = set_and_seed(cell)
    settings = config["sets"][name]
    subject, rate = make_subject(name, settings), settings["train"]["learning_rate"]
    train = subject.parts["train"]
    states = states_of(subject, train, settings["train"], derive_key(seed, "projection") % 2**31)
    models = [subject.load(states[i]) for i in chosen_states(subject, states, train, config["checkpoints"])]
    scored, queries = train.take(torch.arange(settings["scored"])), subject.parts["test"]
    exact, squares = exact_side(models, rate, scored, queries)
    projections = [
        Projection(kind, dim, derive_key(seed, kind) % 2**31) for kind, dims in settings["dims"].items() for dim in dims
    ]
    return {
        "rows": settings["scored"],
        "projections": [
            {"kind": p.kind, "dim": p.dim} | compare(models, rate, scored, queries, p, exact, squares)
            for p in projections
        ],
    }


def exact_side(models: list[nn.Module], rate: float, train: Part, queries: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return exact scores [n, Q] and self-influence [n]."""
    scores, squares = np.zeros((len(train.labels), len(queries.labels))), np.zeros(len(train.labels))
    for model in models:
        block, state = exact_block(model, rate, train, queries)
        assert block.self_influence is not None
        scores += state.weight * block.scores.double().numpy()
        squares += state.weight * block.self_influence.numpy()
    return scores, squares


def compare(
    models: list[nn.Module], rate: float, train: Part, queries: Part, projection: Projection,
    exact: np.ndarray, squares: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """Return the numbers kept of a gradient, every query's Spearman correlation, and the error of sketched self-influence."""
    scores, sketched = np.zeros_like(exact), np.zeros_like(squares)
    projector = projector_of(models[0], projection)  # drawn once: it follows from the parameters' names and shapes
    for model in models:
        state = query_state(model, rate, queries, projector)
        rows, _ = gradient_rows(model, train, projector)
        scores += state.weight * TracIn().score(rows, state).scores.double().numpy()
        sketched += state.weight * squared_rows(rows)
    ratio = sketched / squares
    return {
        "columns": sum(r.rows * r.columns for r in projector.layout.ranges),
        "spearman": [round(float(stats.spearmanr(s, e).statistic), 5) for s, e in zip(scores.T, exact.T, strict=True)],
        "self": {
            "spearman": float(stats.spearmanr(sketched, squares).statistic),
            "relative_error": float(np.sqrt(np.mean((ratio - 1) ** 2))),
        },
    }


def squared_rows(rows: Rows) -> np.ndarray:
    """Return ‖Pg‖² of every row: self-influence as a projection would have it."""
    return torch.stack([array.double().square().sum(1) for array in rows.arrays.values()]).sum(0).numpy()


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Report the mean correlation by projection, interval over seeds and queries, and the error of self-influence."""
    return [gate for name in config["sets"] for gate in gates_of(name, of_set(name, done))]


def gates_of(name: str, results: list[dict[str, Any]]) -> list[Gate]:
    found = []
    for same in zip(*(result["projections"] for result in results), strict=True):
        label = f"{same[0]['kind']} {same[0]['dim']} ({same[0]['columns']:,} numbers), {name}"
        values = np.array([one["spearman"] for one in same])
        found.append(Gate(f"Spearman with exact, {label}", float(values.mean()), two_way_interval(values)))
        errors = np.array([one["self"]["relative_error"] for one in same])
        found.append(Gate(f"self-influence, relative error, {label}", float(errors.mean()), bootstrap_interval(errors)))
    return found


def two_way_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of [seeds, queries], both resampled."""
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, values.shape[0], (DRAWS, values.shape[0]))
    queries = generator.integers(0, values.shape[1], (DRAWS, values.shape[1]))
    means = values[seeds[:, :, None], queries[:, None, :]].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw correlation of the scores and relative error of self-influence against the stored columns."""
    figure = Figure(figsize=(10, 3.6 * len(config["sets"])), layout="constrained")
    lines = figure.subplots(len(config["sets"]), 2, squeeze=False)
    for (left, right), name in zip(lines, config["sets"], strict=True):
        for kind, colour in COLOURS.items():
            draw(left, right, kind, colour, of_set(name, done))
        left.set(ylabel="Spearman with exact scores", ylim=(0, 1.02))
        right.set(ylabel="relative error of self-influence", yscale="log")
        left.set_title(f"{name}: mean and 95 % interval over seeds and queries", loc="left", fontsize=10)
        right.set_title("sketch against exact norms: mean and range over seeds", loc="left", fontsize=10)
        for axes in (left, right):
            axes.set(xscale="log", xlabel="numbers kept of a gradient")
            axes.spines[["top", "right"]].set_visible(False)
        left.legend(frameon=False, fontsize=8)
    save(figure, folder, "projection")


def draw(left: Axes, right: Axes, kind: str, colour: str, results: list[dict[str, Any]]) -> None:
    same = list(zip(*([p for p in r["projections"] if p["kind"] == kind] for r in results), strict=True))
    columns = [one[0]["columns"] for one in same]
    values = [np.array([one["spearman"] for one in seeds]) for seeds in same]
    low, high = zip(*(two_way_interval(v) for v in values), strict=True)
    left.fill_between(columns, low, high, color=colour, alpha=0.2, linewidth=0)
    left.plot(columns, [v.mean() for v in values], "o-", color=colour, label=kind)
    for one, mean in zip(same, values, strict=True):
        left.annotate(str(one[0]["dim"]), (one[0]["columns"], mean.mean()), xytext=(0, -11), textcoords="offset points",
                      fontsize=7, color=colour, ha="center")  # fmt: skip
    errors = np.array([[one["self"]["relative_error"] for one in seeds] for seeds in same])
    right.fill_between(columns, errors.min(1), errors.max(1), color=colour, alpha=0.2, linewidth=0)
    right.plot(columns, errors.mean(1), "o-", color=colour)


EXPERIMENT = Experiment(
    name="tracin.projection",
    claim="How far gradients may be projected before TracIn's ranking changes, two-sided and dense",
    minutes=10,
    cells=seeded_cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
