"""turnover.cleansing: does leaving out the most harmful movie reviews help on electronics? (Kobayashi et al. 2020, table 2)

Networks are trained with masks on movie reviews; a review's score is its influence on the mean loss of some clearly rated
electronics reviews, averaged over mask seeds. The lowest scores are left out, or as many random reviews, or none, and the
network is trained again without masks. Paired: under one seed the three begin alike and see the same batches but for what is
left out, as in the definition of influence. Electronics test reviews are of other products' reviews than those that chose.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn

from engine.batches import Batch
from engine.metrics import bootstrap_interval
from engine.turnover import Loss
from launch.experiments.kept import kept
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, accuracy, loss, mean_loss
from launch.experiments.turnover_subject import (
    Training,
    chosen_rate,
    drawn,
    fit,
    influences,
    make_network,
    read_texts,
    trained,
)

KINDS = {"none": "#888888", "random": "#d9932f", "cleansed": "#0b6e4f"}
ABOVE = 1e-9  # nothing: a gate's threshold itself would pass
PAPER = {"none": (77.0, 0.536), "random": (76.8, 0.521), "cleansed": (78.3, 0.484)}


def cells(config: dict[str, Any]) -> list[str]:
    again = [f"{kind}-{seed}" for seed in config["seeds"] for kind in KINDS]
    return [*(f"scores-{seed}" for seed in config["mask_seeds"]), "dropped", *again]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return accuracy and loss on electronics test reviews after training again; of the first cells what is left out."""
    kind, _, seed = cell.partition("-")
    if kind == "scores":
        return {"spread": float(scores_of(config, int(seed)).std())}
    if kind == "dropped":
        return chosen(config)
    dropped = {
        "none": lambda: torch.empty(0, dtype=torch.int64),
        "random": lambda: drawn(left_out(config), config["rows"], int(seed), "left out"),
        "cleansed": lambda: worst(config),
    }[kind]()
    return retrained(config, int(seed), dropped)


def target(config: dict[str, Any]) -> Part:
    """Return the electronics dev reviews whose mean loss is the target: as many of either label, drawn once."""
    dev = read_texts(config["network"], config["electronics"]).parts["dev"]
    order = drawn(len(dev.labels), len(dev.labels), 0, "target")
    return dev.take(torch.cat([order[dev.labels[order] == label][: config["per_label"]] for label in (0, 1)]))


def scores_of(config: dict[str, Any], seed: int) -> Tensor:
    """Return every movie review's influence on the mean loss of the target under one mask seed, float64 [n]."""

    def make() -> dict[str, Tensor]:
        network = trained(config, config["movie"], True, config["rows"], seed)
        return {"scores": influences(network, torch.arange(config["rows"]), target(config)).mean(1)}

    given = {key: config[key] for key in ("network", "movie", "electronics", "train", "rows", "per_label")}
    return kept("turnover-cleansing", given | {"seed": seed}, make)["scores"]


def left_out(config: dict[str, Any]) -> int:
    return round(config["share"] * config["rows"])


def worst(config: dict[str, Any]) -> Tensor:
    """Return the reviews with the lowest scores, means over the mask seeds."""
    scores = torch.stack([scores_of(config, seed) for seed in config["mask_seeds"]]).mean(0)
    return scores.argsort(stable=True)[: left_out(config)]


def chosen(config: dict[str, Any]) -> dict[str, Any]:
    """Return what is left out, and how far two mask seeds agree."""
    pair = [scores_of(config, seed).numpy() for seed in config["mask_seeds"][:2]]
    records = read_texts(config["network"], config["movie"]).records["train"]
    return {
        "agreement": float(stats.spearmanr(*pair).statistic),
        "reviews": [[records[i]["label"], records[i]["text"]] for i in worst(config).tolist()],
    }


def without(dropped: Tensor, rows: int) -> Loss:
    """Return the loss that some examples take no part in; the mean over a batch is still over all its rows."""
    kept_rows = torch.ones(rows)
    kept_rows[dropped] = 0.0

    def weighted(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model, batch) * kept_rows[batch.ids]

    return weighted


def retrained(config: dict[str, Any], seed: int, dropped: Tensor) -> dict[str, Any]:
    """Train without masks and without some reviews; return accuracy and mean loss on the electronics test reviews."""
    movie = read_texts(config["network"], config["movie"])
    test = read_texts(config["network"], config["electronics"]).parts["test"]
    rate = chosen_rate(config, config["movie"], masked=False)
    training = Training(False, rate, config["rows"], seed, config["again_epochs"])
    weights = fit(config["network"], movie.parts["train"], 2, training, without(dropped, config["rows"]))[-1]
    model = make_network(config["network"], 2, seed).load(weights).model
    return {"accuracy": 100 * accuracy(model, test), "loss": mean_loss(model, test)}


def figures(config: dict[str, Any], done: dict[str, dict[str, Any]], figure: str) -> dict[str, np.ndarray]:
    return {kind: np.array([done[f"{kind}-{seed}"][figure] for seed in config["seeds"]]) for kind in KINDS}


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge that accuracy rises and loss falls against both others: low ends of paired intervals over seeds."""
    right, wrong = figures(config, done, "accuracy"), figures(config, done, "loss")
    gains = {
        (name, other): gain
        for other in ("none", "random")
        for name, gain in (
            ("accuracy gained, points", right["cleansed"] - right[other]),
            ("loss lowered", wrong[other] - wrong["cleansed"]),
        )
    }
    paper = {
        (name, other): (PAPER["cleansed"][0] - PAPER[other][0], PAPER[other][1] - PAPER["cleansed"][1])[
            name.startswith("loss")
        ]
        for name, other in gains
    }
    return [
        *(Gate(f"{name}, over {other}, low end", bootstrap_interval(gain)[0], threshold=ABOVE)
          for (name, other), gain in gains.items()),
        *(Gate(f"{name}, over {other}", float(gain.mean()), bootstrap_interval(gain), paper=paper[name, other])
          for (name, other), gain in gains.items()),
        *(Gate(f"accuracy, {kind}, %", float(own.mean()), bootstrap_interval(own), paper=PAPER[kind][0])
          for kind, own in right.items()),
        *(Gate(f"loss, {kind}", float(own.mean()), bootstrap_interval(own), paper=PAPER[kind][1])
          for kind, own in wrong.items()),
        Gate("agreement of two mask seeds, Spearman", done["dropped"]["agreement"]),
    ]  # fmt: skip


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw every seed's accuracy and loss, and write down what was left out."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        found = figures(config, done, name)
        axes.plot(range(len(KINDS)), np.array(list(found.values())), ".-", color="#cccccc", linewidth=0.8)
        for place, (kind, colour) in enumerate(KINDS.items()):
            axes.plot(place, found[kind].mean(), "o", color=colour, markersize=9)
        axes.set_xticks(range(len(KINDS)), list(KINDS))
        axes.set_ylabel(f"{name} on electronics reviews{', %' if name == 'accuracy' else ''}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{config['share']:.0%} of {config['rows']:,} movie reviews left out, {len(config['seeds'])} seeds",
                    x=0.01, ha="left", fontsize=10)  # fmt: skip
    save(figure, folder, "cleansing")
    lines = ["# Movie reviews left out, the most harmful first", ""]
    lines += [f"- {'positive' if label else 'negative'}: {text}" for label, text in done["dropped"]["reviews"]]
    (Path(folder) / "dropped.md").write_text("\n".join(lines) + "\n")


EXPERIMENT = Experiment(
    name="turnover.cleansing",
    claim="Leaving out the 1 % most harmful movie reviews helps on electronics reviews",
    minutes=45,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
