"""turnover.many-class: turn-over dropout with 45 classes: WordNet glosses in the place of Yahoo Answers' ten topics.

The gloss's class is its lexicographer file. What the other experiments ask of two classes is asked here of many: accuracy with
and without masks, self-influence, and whether the training glosses that taught a mistake are nearer to it than others of the
same, wrong class. Train, dev and test are different synsets. A cell is one training, one seed's scores, or their mean.
"""

from typing import Any

import numpy as np
import torch

from engine.masks import unseen_ids
from engine.metrics import bootstrap_interval
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import logits_of
from launch.experiments.turnover_errors import draw, explained, gates_of, scores_of, spread
from launch.experiments.turnover_self import described, differences
from launch.experiments.turnover_subject import chosen_rate, dev_losses, read_texts, trained

KINDS = ("plain", "masked")


def cells(config: dict[str, Any]) -> list[str]:
    return [
        *(f"rate-{kind}" for kind in KINDS),
        *(f"{kind}-{seed}" for seed in config["seeds"] for kind in KINDS),
        *(f"scores-{seed}" for seed in config["seeds"]),
        "mistakes",
    ]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return what the cell's name says, of the masked trainings also their self-influence."""
    kind, _, rest = cell.partition("-")
    glosses = config["glosses"]
    if kind == "rate":
        reached = dev_losses(config, glosses, rest == "masked")
        return {"dev": list(reached.values()), "chosen": chosen_rate(config, glosses, rest == "masked")}
    if kind == "scores":
        return {"spread": spread(scores_of(config, glosses, int(rest)))}
    if kind == "mistakes":
        return {"mistakes": explained(config, glosses)}
    parts = read_texts(config["network"], glosses).parts
    network = trained(config, glosses, kind == "masked", config["rows"], int(rest))
    right = logits_of(network.model, parts["test"]).argmax(1) == parts["test"].labels
    found: dict[str, Any] = {"right": "".join(str(int(one)) for one in right)}
    if kind == "masked":
        some = parts["train"].take(torch.arange(config["looked_at"]))
        for name, ids in (("own", torch.arange(config["looked_at"])), ("unseen", unseen_ids(config["looked_at"]))):
            found[name] = described(differences(network, some, ids))
    return found


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Report accuracies over test glosses and self-influence over seeds; judge the mistakes as turnover.errors does."""
    right = {
        kind: np.array([[100 * int(one) for one in done[f"{kind}-{seed}"]["right"]] for seed in config["seeds"]]).mean(
            0
        )
        for kind in KINDS
    }

    def over_glosses(name: str, values: np.ndarray) -> Gate:
        return Gate(name, float(values.mean()), bootstrap_interval(values))

    def over_seeds(name: str, kind: str, figure: str) -> Gate:
        values = np.array([done[f"masked-{seed}"][kind][figure] for seed in config["seeds"]])
        return Gate(name, float(values.mean()), bootstrap_interval(values))

    return [
        *gates_of(done["mistakes"]["mistakes"]),
        over_glosses("accuracy lost, points", right["plain"] - right["masked"]),
        *(over_glosses(f"accuracy, {kind}, %", values) for kind, values in right.items()),
        over_seeds("self-influence, positive share", "own", "positive"),
        over_seeds("never-trained ids: positive share", "unseen", "positive"),
        *(Gate(f"learning rate, {kind}", done[f"rate-{kind}"]["chosen"]) for kind in KINDS),
    ]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    draw(done["mistakes"]["mistakes"], folder, str)


EXPERIMENT = Experiment(
    name="turnover.many-class",
    claim="With 45 classes: accuracy, self-influence, and the glosses that taught a mistake are near it",
    minutes=30,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
