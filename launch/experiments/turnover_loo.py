"""turnover.loo: does turn-over dropout's estimate rank examples as leaving them out does? (its definition, equation 1)

A network with one hidden layer on MiniLM's output averaged over a review's tokens, few reviews. The truth: the same network
without masks, trained again without one review, from the same initial weights and in the same batches. The estimate: the
mean over R networks trained with masks on the hidden layer, each under a mask seed of its own. A cell is a seed of the initial
weights and the order.
"""

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from engine.batches import Batch
from engine.masks import MaskSettings
from engine.metrics import bootstrap_interval
from engine.training import TrainSettings, train
from engine.turnover import Loss, TurnOver, under_own_masks
from engine.turnover_scores import Estimator
from launch.experiments.heads import CLASSES, features
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import Part, accuracy, loss, mlp
from launch.experiments.turnover_cleansing import without
from launch.experiments.turnover_subject import drawn

HIDDEN = "1"  # the layer whose output is masked


def cells(config: dict[str, Any]) -> list[str]:
    return [f"seed-{seed}" for seed in config["seeds"]]


def run_seed(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return every query's correlations between estimate and truth for every R, over the reviews left out."""
    seed, parts = int(cell.removeprefix("seed-")), features(config)
    ids = drawn(config["left_out"], config["rows"]["train"], seed, "left out")
    queries = parts["test"].batch(torch.arange(config["rows"]["test"]))
    truth = rises_without(config, parts["train"], queries, ids, seed)
    blocks = torch.stack([estimates(config, parts["train"], queries, ids, seed, r) for r in range(config["most"])])
    plain = fitted(config, parts["train"], seed)
    return {
        "agreement": {str(count): agreement(blocks[:count].mean(0), truth) for count in config["counts"]},
        "accuracy": accuracy(plain, parts["test"]),
        "truth": float(truth.std()),
    }


def make_model(config: dict[str, Any], part: Part, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    assert isinstance(part.inputs, Tensor)
    return mlp([part.inputs.shape[1], config["width"], CLASSES]).double()


def descend(config: dict[str, Any], model: nn.Module, part: Part, objective: Loss, seed: int) -> nn.Module:
    def collate(rows: list[int]) -> Batch:
        return part.batch(torch.tensor(rows))

    settings = TrainSettings(**config["train"], checkpoints=1, seed=seed)
    for _ in train(model, objective, collate, list(range(len(part.labels))), settings):
        pass
    return model.eval()


def fitted(config: dict[str, Any], part: Part, seed: int, objective: Loss = loss) -> nn.Module:
    """Return the network without masks."""
    return descend(config, make_model(config, part, seed), part, objective, seed)


def rises_without(config: dict[str, Any], part: Part, queries: Batch, ids: Tensor, seed: int) -> Tensor:
    """Return how much each query's loss rises without each of the examples, float64 [n, Q]."""
    with_all = fitted(config, part, seed)
    again = [fitted(config, part, seed, without(one[None], len(part.labels))) for one in ids]
    with torch.no_grad():
        return torch.stack([loss(model, queries) for model in again]) - loss(with_all, queries)


def estimates(config: dict[str, Any], part: Part, queries: Batch, ids: Tensor, seed: int, number: int) -> Tensor:
    """Return L(f^m̃(z), q) − L(f^m(z), q) of a network trained under one mask seed, float64 [n, Q]."""
    model = make_model(config, part, seed)
    turnover = TurnOver(model, MaskSettings(seed=number), after=[HIDDEN])
    descend(config, model, part, under_own_masks(turnover, loss), seed)
    return Estimator(turnover, loss, rows=4096).influence(ids, queries)


def agreement(estimate: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Return every query's correlations over the examples."""
    pairs = list(zip(estimate.T.numpy(), truth.T.numpy(), strict=True))
    return {
        "spearman": [float(stats.spearmanr(a, b).statistic) for a, b in pairs],
        "pearson": [float(stats.pearsonr(a, b).statistic) for a, b in pairs],
    }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Report the correlations; intervals over queries, each a mean over the seeds."""

    def over_queries(of: str, count: int) -> Gate:
        values = np.mean([one["agreement"][str(count)][of] for one in done.values()], axis=0)
        return Gate(f"{of}, mean of {count} mask seeds", float(values.mean()), bootstrap_interval(values))

    return [
        *(over_queries("spearman", count) for count in reversed(config["counts"])),
        over_queries("pearson", max(config["counts"])),
        Gate("accuracy of the network without masks", float(np.mean([one["accuracy"] for one in done.values()]))),
        Gate("standard deviation of the true rises", float(np.mean([one["truth"] for one in done.values()]))),
    ]


EXPERIMENT = Experiment(
    name="turnover.loo",
    claim="How far turn-over dropout ranks 300 reviews as leaving them out and training again does",
    minutes=5,
    cells=cells,
    run=run_seed,
    gates=gates,
)
