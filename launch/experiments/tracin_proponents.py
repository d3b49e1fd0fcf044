"""tracin.proponents: do the proponents of a correct prediction share its label? (Pruthi et al. 2020, figure 9, table 2)

For test examples that the model gets right, TracInCP without projection ranks all training examples; counted are the
labels of the three highest (proponents) and the three lowest (opponents). Beside it: chance, and the three training
examples nearest in what the classifier is given. The first few queries, mistakes among them, are shown with their top
five of either side. A cell is one data set and seed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine.counters import derive_key
from engine.metrics import bootstrap_interval
from engine.topk import top_k
from launch.experiments.passes import chosen_states, exact_scores, states_of
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import (
    Part,
    accuracy,
    gloss_classes,
    logits_of,
    make_subject,
    of_set,
    read_records,
    seeded_cells,
    set_and_seed,
)

COUNTED, SHOWN = 3, 5
LINE = 1.2  # height of a line of digits, in digits
RIGHT_SHOWN, WRONG_SHOWN = 4, 2
KINDS = {"proponents": "#0b6e4f", "opponents": "#c8553d", "nearest": "#3d5a98"}
NAMES = {"proponents": "proponents", "opponents": "opponents", "nearest": "nearest in the classifier's input"}


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Train, score, rank; return per query how many of either side's first three share its label, and what is shown."""
    name, seed = set_and_seed(cell)
    settings = config["sets"][name]
    subject = make_subject(name, settings)
    train, test = subject.parts["train"], subject.parts["test"]
    states = states_of(subject, train, settings["train"], derive_key(seed, "proponents") % 2**31)
    models = [subject.load(states[i]) for i in chosen_states(subject, states, train, config["checkpoints"])]
    last = subject.load(states[-1])
    predicted = logits_of(last, test).argmax(1)
    right = torch.nonzero(predicted == test.labels).flatten()[: config["queries"]]
    wrong = torch.nonzero(predicted != test.labels).flatten()[:WRONG_SHOWN]
    queries = torch.cat([right, wrong])
    scores = exact_scores(models, settings["train"]["learning_rate"], train, test.take(queries))
    depth = min(config["depth"], len(train.labels))
    ranked = ranking(scores, nearness(train, test.take(queries)), depth)
    same = {kind: (train.labels[ids] == test.labels[queries, None]).numpy() for kind, ids in ranked.items()}
    counts = {kind: found[: len(right), :COUNTED].sum(1).tolist() for kind, found in same.items()}
    share = train.labels.bincount(minlength=subject.classes) / len(train.labels)
    shown = [*range(min(RIGHT_SHOWN, len(right))), *range(len(right), len(queries))]
    return {
        "queries": right.tolist(),
        "same": counts,
        "chance": share[test.labels[right]].double().tolist(),
        "by_rank": {kind: found[: len(right)].mean(0).round(4).tolist() for kind, found in same.items()},
        "accuracy": {part: accuracy(last, subject.parts[part]) for part in ("train", "dev", "test")},
        "shown": [
            {"query": int(queries[i]), "predicted": int(predicted[queries[i]])}
            | {side: ranked[side][i, :SHOWN].tolist() for side in ("proponents", "opponents")}
            for i in shown
        ],
    }


def ranking(scores: np.ndarray, near: np.ndarray, depth: int) -> dict[str, Tensor]:
    """Return per kind the training rows [Q, depth], first = highest score, lowest score, nearest."""
    rows = np.arange(len(scores))
    ends = top_k(rows, scores, depth).ids
    kinds = {"proponents": ends[0], "opponents": ends[1], "nearest": top_k(rows, near, depth).ids[0]}
    return {kind: torch.from_numpy(ids) for kind, ids in kinds.items()}


def nearness(train: Part, queries: Part) -> np.ndarray:
    """Return the cosine of what the classifier is given, [n, Q]."""
    assert isinstance(train.inputs, Tensor)
    assert isinstance(queries.inputs, Tensor)
    return (F.normalize(train.inputs) @ F.normalize(queries.inputs).T).numpy()


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the proponents' labels of each data set, means over test examples; report opponents and baselines."""
    return [gate for name in config["sets"] for gate in gates_of(name, of_set(name, done))]


def gates_of(name: str, results: list[dict[str, Any]]) -> list[Gate]:
    same = {kind: by_example(results, [r["same"][kind] for r in results]) / COUNTED for kind in KINDS}

    def share(label: str, values: np.ndarray, threshold: float | None = None) -> Gate:
        return Gate(f"{label}, {name}", float(values.mean()), bootstrap_interval(values), threshold)

    return [
        share("top-3 proponents with the query's label", same["proponents"], 0.90),
        share("top-3 opponents with another label", 1 - same["opponents"]),
        share("3 nearest inputs with the query's label", same["nearest"]),
        share("random training examples with it", by_example(results, [r["chance"] for r in results])),
        share("accuracy on test", np.array([r["accuracy"]["test"] for r in results])),
    ]


def by_example(results: list[dict[str, Any]], values: list[list[float]]) -> np.ndarray:
    """Return the mean over seeds of every test example that was a query: the unit that is resampled."""
    found: dict[int, list[float]] = {}
    for result, own in zip(results, values, strict=True):
        for query, value in zip(result["queries"], own, strict=True):
            found.setdefault(query, []).append(value)
    return np.array([np.mean(own) for own in found.values()])


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw the share of the query's label by rank; show the first seed's queries with their top five."""
    figure = Figure(figsize=(5.5 * len(config["sets"]), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(config["sets"])), config["sets"], strict=True):
        draw(axes, name, of_set(name, done))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, folder, "by-rank")
    first = config["seeds"][0]
    for name, show in (("mnist", show_digits), ("glosses", show_glosses)):
        show(config["sets"][name], done[f"{name}-seed-{first}"]["shown"], Path(folder))


def draw(axes: Axes, name: str, results: list[dict[str, Any]]) -> None:
    for kind, colour in KINDS.items():
        curves = np.array([result["by_rank"][kind] for result in results])
        ranks = np.arange(1, curves.shape[1] + 1)
        axes.fill_between(ranks, curves.min(0), curves.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(ranks, curves.mean(0), color=colour, label=NAMES[kind])
    chance = np.mean([np.mean(result["chance"]) for result in results])
    axes.axhline(float(chance), color="#888888", linewidth=1, linestyle=":", label="random")
    axes.set(xlabel="rank", ylim=(-0.02, 1.02))
    axes.set_title(f"{name}: training examples with the query's label", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def show_digits(settings: dict[str, Any], shown: list[dict[str, Any]], folder: Path) -> None:
    """Draw one line of images a query: itself, five proponents, five opponents, each with its label."""
    subject = make_subject("mnist", settings)
    train, test = subject.parts["train"], subject.parts["test"]
    assert isinstance(train.inputs, Tensor)
    assert isinstance(test.inputs, Tensor)
    places = {"test digit": 0.3, "proponents": 1.9, "opponents": 2.3 + SHOWN}  # columns where each side begins
    width, height = 2.5 + 2 * SHOWN, 0.4 + LINE * len(shown)
    figure = Figure(figsize=(0.8 * width, 0.8 * height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for name, x in places.items():
        axes.text(x, 0.3, name, color=KINDS.get(name, "black"), fontsize=9)
    for line, one in enumerate(shown):
        label, top = int(test.labels[one["query"]]), 0.4 + LINE * line
        said = "" if one["predicted"] == label else f", taken for {one['predicted']}"
        picture(axes, test.inputs[one["query"]], places["test digit"], top, f"{label}{said}", "black")
        for side in ("proponents", "opponents"):
            for place, row in enumerate(one[side]):
                title = str(int(train.labels[row]))
                picture(axes, train.inputs[row], places[side] + place, top, title, KINDS[side])
    figure.savefig(folder / "digits.png", dpi=100)


def picture(axes: Axes, pixels: Tensor, x: float, y: float, title: str, colour: str) -> None:
    """Draw a digit, one unit wide, below its title; y points down."""
    axes.text(x + 0.5, y + 0.2, title, color=colour, fontsize=8, ha="center")
    place = (x + 0.05, x + 0.95, y + 1.15, y + 0.25)
    axes.imshow(pixels.view(28, 28).numpy(), cmap="gray_r", vmin=0, vmax=1, extent=place, aspect="auto", zorder=2)


def show_glosses(settings: dict[str, Any], shown: list[dict[str, Any]], folder: Path) -> None:
    """Write one table a query: its text, five proponents and five opponents, each with its label."""
    rows = settings["rows"]
    records = read_records(settings["data"])[: sum(rows.values())]
    classes, first = gloss_classes(records), rows["train"] + rows["dev"]
    parts = ["# Glosses with their top proponents and opponents"]
    for one in shown:
        query = records[first + one["query"]]
        said = f"{query['label']}, predicted {classes[one['predicted']]}"
        lines = [f"**{query['text']}** ({said})", "", "| | label | gloss |", "|---|---|---|"]
        for side in ("proponents", "opponents"):
            lines += [f"| {side[:-1]} | {records[row]['label']} | {cell_text(records[row])} |" for row in one[side]]
        parts.append("\n".join(lines))
    (folder / "glosses.md").write_text("\n\n".join(parts) + "\n")


def cell_text(record: dict[str, Any]) -> str:
    return record["text"].replace("|", "\\|")


EXPERIMENT = Experiment(
    name="tracin.proponents",
    claim="The top proponents of a correct prediction share its label: MNIST digits and WordNet glosses of 45 classes",
    minutes=8,
    cells=seeded_cells,
    run=run_seed,
    gates=gates,
    plot=plot,
)
