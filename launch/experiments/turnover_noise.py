"""turnover.cleansing-noise: are the reviews that cleansing leaves out the ones with wrong labels?

As turnover.cleansing, but a tenth of the movie reviews has the other label, and nothing is trained again: the precision of
what would be left out, against the tenth that a random choice has. Beside it, what two rankings that ask nothing of the
electronics reviews find: the highest loss under the flipped mask, and the lowest influence of a review on itself. A cell is
one seed: its own wrong labels, masks and initial weights.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.metrics import auroc, bootstrap_interval
from engine.turnover_scores import paired_losses
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, loss
from launch.experiments.turnover_cleansing import left_out, target
from launch.experiments.turnover_subject import (
    Network,
    Training,
    after_training,
    chosen_rate,
    drawn,
    influences,
    read_texts,
)

RANKINGS = {
    "influence": "lowest influence on the target",
    "flipped": "highest loss under the flipped mask",
    "self": "lowest self-influence",
}


def cells(config: dict[str, Any]) -> list[str]:
    return [f"seed-{seed}" for seed in config["seeds"]]


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the share of wrong labels in what each ranking would leave out, and each one's AUROC."""
    seed = int(cell.removeprefix("seed-"))
    train = read_texts(config["network"], config["movie"]).parts["train"].take(torch.arange(config["rows"]))
    labels, flipped = with_noise(train.labels, config["flipped"], seed)
    training = Training(
        True, chosen_rate(config, config["movie"], True), config["rows"], seed, config["train"]["epochs"]
    )
    network = after_training(config["network"], config["movie"], training, labels)
    suspicion = rankings(network, Part(train.inputs, labels), target(config))
    return {
        "precision": {name: precision(values, flipped, left_out(config)) for name, values in suspicion.items()},
        "auroc": {name: auroc(values.numpy(), flipped.numpy()) for name, values in suspicion.items()},
    }


def with_noise(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the labels of two classes, of which a random share is the other one, and which ones those are, bool [n]."""
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[drawn(round(share * len(labels)), len(labels), seed, "wrong labels")] = True
    return torch.where(flipped, 1 - labels, labels), flipped


def rankings(network: Network, train: Part, asked: Part) -> dict[str, Tensor]:
    """Return how suspect every training review is by each ranking, float64 [n]."""
    own, flipped = torch.empty(2, len(train.labels), dtype=torch.float64)
    for batch in train.batches():
        own[batch.ids] = paired_losses(network.turnover, loss, batch, batch.ids, "own")
        flipped[batch.ids] = paired_losses(network.turnover, loss, batch, batch.ids, "flipped")
    influence = influences(network, torch.arange(len(train.labels)), asked).mean(1)
    return {"influence": -influence, "flipped": flipped, "self": own - flipped}


def precision(suspicion: Tensor, flipped: Tensor, count: int) -> float:
    """Return the share of wrong labels among the most suspect."""
    return float(flipped[suspicion.argsort(descending=True, stable=True)[:count]].double().mean())


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the precision as a multiple of the base rate; intervals over seeds."""

    def over_seeds(name: str, of: str, ranking: str, scale: float = 1.0, threshold: float | None = None) -> Gate:
        values = np.array([one[of][ranking] for one in done.values()]) / scale
        return Gate(name, float(values.mean()), bootstrap_interval(values), threshold)

    return [
        over_seeds(
            "precision of what is left out, times the base rate", "precision", "influence", config["flipped"], 3.0
        ),
        *(over_seeds(f"precision, {name}", "precision", ranking) for ranking, name in RANKINGS.items()),
        *(over_seeds(f"auroc, {name}", "auroc", ranking) for ranking, name in RANKINGS.items()),
    ]


EXPERIMENT = Experiment(
    name="turnover.cleansing-noise",
    claim="Among the 1 % most harmful movie reviews wrong labels are more frequent than among all",
    minutes=45,
    cells=cells,
    run=run_seed,
    gates=gates,
)
