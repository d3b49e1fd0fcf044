"""turnover.accuracy: what do masks of their own cost? (Kobayashi et al. 2020, table of section 4.1: the cost shrinks with N)

MiniLM's top layers with adapters and a head on clearly rated movie reviews, trained with turn-over dropout and without, on few
reviews and on many. Each kind has the learning rate with the least loss on dev reviews, of a training on few reviews under a
seed of its own. A cell is one kind, number of reviews and seed; under one seed both kinds start alike and see the same batches.
"""

import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine.metrics import bootstrap_interval
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import logits_of
from launch.experiments.turnover_subject import chosen_rate, dev_losses, read_texts, trained

KINDS = {"plain": "#3d5a98", "masked": "#c8553d"}
PAPER = {"plain": 90.0, "masked": 88.3}  # SST-2, 5,000 sentences, BERT


def cells(config: dict[str, Any]) -> list[str]:
    runs = itertools.product(config["sizes"], config["seeds"], KINDS)
    return [*(f"rate-{kind}" for kind in KINDS), *(f"{kind}-{rows}-seed-{seed}" for rows, seed, kind in runs)]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return which test reviews a network gets right; of a cell `rate`, what the rates reach on dev reviews."""
    kind, _, rest = cell.partition("-")
    if kind == "rate":
        reached = dev_losses(config, config["movie"], rest == "masked")
        return {"dev": list(reached.values()), "chosen": chosen_rate(config, config["movie"], rest == "masked")}
    rows, _, seed = rest.partition("-seed-")
    network = trained(config, config["movie"], kind == "masked", int(rows), int(seed))
    test = read_texts(config["network"], config["movie"]).parts["test"]
    right = logits_of(network.model, test).argmax(1) == test.labels
    return {"right": "".join(str(int(one)) for one in right)}


def right_of(config: dict[str, Any], done: dict[str, dict[str, Any]], kind: str, rows: int) -> np.ndarray:
    """Return the percentage right of every test review over the seeds, [seeds, n], 0 or 100 each."""
    return np.array([[100 * int(one) for one in done[f"{kind}-{rows}-seed-{s}"]["right"]] for s in config["seeds"]])


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the drop with many reviews and that it is smaller than with few; intervals over the test reviews."""
    few, many = config["sizes"]
    right = {(kind, rows): right_of(config, done, kind, rows) for kind in KINDS for rows in config["sizes"]}
    drop = {rows: right["plain", rows] - right["masked", rows] for rows in config["sizes"]}

    def over_reviews(name: str, found: np.ndarray, **asked: Any) -> Gate:
        return Gate(name, float(found.mean()), bootstrap_interval(found.mean(0)), **asked)

    return [
        over_reviews(f"accuracy lost at {many:,}, points", drop[many], threshold=3.0, at_least=False, paper=1.7),
        over_reviews(f"less lost at {many:,} than at {few:,}, points", drop[few] - drop[many], threshold=0.0),
        over_reviews(f"accuracy lost at {few:,}, points", drop[few]),
        *(Gate(f"the same, over seeds, at {n:,}", float(drop[n].mean()), bootstrap_interval(drop[n].mean(1)))
          for n in config["sizes"]),
        *(over_reviews(f"accuracy at {rows:,}, {kind}, %", found, paper=PAPER[kind] if rows == many else None)
          for (kind, rows), found in right.items()),
        *(Gate(f"learning rate, {kind}", done[f"rate-{kind}"]["chosen"]) for kind in KINDS),
        *(Gate(f"loss on dev reviews, {kind}, rate {rate:g}", reached)
          for kind in KINDS
          for rate, reached in zip(config["train"]["rates"][kind], done[f"rate-{kind}"]["dev"], strict=True)),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw accuracy against the number of reviews: mean over the seeds, and each of them."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for kind, colour in KINDS.items():
        found = np.array([right_of(config, done, kind, rows).mean(1) for rows in config["sizes"]])
        axes.plot(
            config["sizes"],
            found.mean(1),
            color=colour,
            label=f"{kind}: {', '.join(f'{m:.1f}' for m in found.mean(1))}",
        )
        axes.plot(config["sizes"], found, "o", color=colour, markersize=3)
    axes.set_xticks(config["sizes"])
    axes.set(xlabel="training reviews", ylabel="accuracy on test reviews, %")
    axes.set_title(f"with and without turn-over dropout, {len(config['seeds'])} seeds", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save(figure, folder, "accuracy")


EXPERIMENT = Experiment(
    name="turnover.accuracy",
    claim="Turn-over dropout costs little accuracy, and less with more data: MiniLM with adapters on movie reviews",
    minutes=30,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
