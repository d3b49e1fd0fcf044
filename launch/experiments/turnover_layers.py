"""turnover.all-layers: adapters and masks in every layer, beside the top third that the other experiments mask.

The paper masks the adapters of all layers, and finds that masking the layers themselves makes training unstable. At one size
both networks are trained on the same movie reviews, with masks and without: what the masks cost in accuracy, and
self-influence. Then with wrong labels planted, as in turnover.cleansing-noise: how many of them are among the reviews with the
lowest influence on some electronics reviews. Reported, one seed. A cell is a training, or some of the queries.
"""

from typing import Any

import numpy as np
import torch

from engine.masks import unseen_ids
from engine.metrics import auroc, bootstrap_interval
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import logits_of
from launch.experiments.turnover_cleansing import left_out, target
from launch.experiments.turnover_noise import precision, with_noise
from launch.experiments.turnover_self import described, differences
from launch.experiments.turnover_subject import Training, after_training, chosen_rate, influences, read_texts

PLACES = ("all", "top")
KINDS = ("plain", "masked")


def cells(config: dict[str, Any]) -> list[str]:
    trainings = [f"{kind}-{place}" for place in PLACES for kind in KINDS]
    return [*trainings, *(f"planted-{place}-{number}" for place in PLACES for number in range(config["cuts"]))]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return a training's right answers and self-influence, or every review's summed influence on some of the queries."""
    kind, place, *rest = cell.split("-")
    settings = config["networks"][place]
    parts = read_texts(settings, config["movie"]).parts
    training = Training(
        kind != "plain", rate_of(config, kind != "plain"), config["rows"], config["seed"], config["train"]["epochs"]
    )
    if kind == "planted":
        labels, _ = with_noise(parts["train"].labels[: config["rows"]], config["flipped"], config["seed"])
        network = after_training(settings, config["movie"], training, labels)
        asked = target(config | {"network": settings})
        own = torch.arange(len(asked.labels)).tensor_split(config["cuts"])[int(rest[0])]
        found = influences(network, torch.arange(config["rows"]), asked.take(own)).sum(1)
        return {"influence": [float(f"{value:.4g}") for value in found.tolist()]}
    network = after_training(settings, config["movie"], training)
    right = logits_of(network.model, parts["test"]).argmax(1) == parts["test"].labels
    result: dict[str, Any] = {"right": "".join(str(int(one)) for one in right)}
    if kind == "masked":
        train = parts["train"].take(torch.arange(config["rows"]))
        for name, ids in (("own", torch.arange(config["rows"])), ("unseen", unseen_ids(config["rows"]))):
            result[name] = described(differences(network, train, ids))
    return result


def rate_of(config: dict[str, Any], masked: bool) -> float:
    """Return the rate that turnover.accuracy chose on dev reviews, with the top third."""
    return chosen_rate(config | {"network": config["networks"]["top"]}, config["movie"], masked)


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    return [gate for place in PLACES for gate in gates_of(config, done, place)]


def gates_of(config: dict[str, Any], done: dict[str, dict[str, Any]], place: str) -> list[Gate]:
    """Report one place's figures; intervals over test reviews."""
    where = {"all": "all layers", "top": "top third"}[place]
    right = {kind: np.array([100 * int(one) for one in done[f"{kind}-{place}"]["right"]]) for kind in KINDS}
    _, flipped = with_noise(torch.zeros(config["rows"], dtype=torch.int64), config["flipped"], config["seed"])
    blocks = [done[f"planted-{place}-{number}"]["influence"] for number in range(config["cuts"])]
    suspicion = -torch.tensor(blocks, dtype=torch.float64).sum(0)
    masked = done[f"masked-{place}"]

    def over_reviews(name: str, values: np.ndarray) -> Gate:
        return Gate(f"{where}: {name}", float(values.mean()), bootstrap_interval(values))

    return [
        over_reviews("accuracy lost, points", right["plain"] - right["masked"]),
        *(over_reviews(f"accuracy, {kind}, %", values) for kind, values in right.items()),
        Gate(f"{where}: self-influence, positive share", masked["own"]["positive"]),
        Gate(f"{where}: never-trained ids, positive share", masked["unseen"]["positive"]),
        Gate(f"{where}: wrong labels in what is left out, times the base rate",
             precision(suspicion, flipped, left_out(config)) / config["flipped"]),
        Gate(f"{where}: auroc of wrong labels", auroc(suspicion.numpy(), flipped.numpy())),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="turnover.all-layers",
    claim="Masks on the adapters of all six layers, beside the top third: accuracy, self-influence, planted wrong labels",
    minutes=30,
    cells=cells,
    run=run_cell,
    gates=gates,
)
