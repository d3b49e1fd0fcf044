"""representer.logits: do representer values add up to a prediction's logits? (Yeh et al. 2018; appendix B.2 of TracIn)

Movie reviews as MiniLM's output averaged over their tokens. The last layer is trained again with λ‖W‖² until its gradient
vanishes; then every test review's logit of either class must be Σ α_i (f_i · f(q)) over the training reviews. A cell is one
λ. Beside it two habits of public code, reported: a layer whose training stops once the gradient is a 200th of what it was,
and α from the layer's own answers in the place of the true labels, which explains the layer and not the data.
"""

from typing import Any

import torch
from torch import Tensor

from engine.representer import (
    Head,
    HeadSettings,
    coefficients,
    representer_values,
    retrain_head_here,
    shard_loss,
)
from launch.experiments.heads import CLASSES, features
from launch.experiments.registry import Experiment, Gate

_SHARDS = 16
_EARLY = 200  # the share of its first gradient at which an early stop ends
FIGURES = ("error", "error_early", "error_distilled", "gradient", "iterations", "accuracy")


def cells(config: dict[str, Any]) -> list[str]:
    return [f"penalty-{penalty:g}" for penalty in config["penalties"]]


def run_penalty(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return how far the sums are from the logits at most, under a stationary layer and under the two habits."""
    parts, penalty = features(config), float(cell.removeprefix("penalty-"))
    f, queries = (inputs for part in ("train", "test") if isinstance(inputs := parts[part].inputs, Tensor))
    labels, truth = parts["train"].labels, parts["test"].labels
    shards = list(zip(f.chunk(_SHARDS), labels.chunk(_SHARDS), strict=True))
    head = retrain_head_here(shards, CLASSES, HeadSettings(penalty, tolerance=config["tolerance"]))
    first = shard_loss(torch.zeros_like(head.weights), f, labels).gradient.norm() / len(f)
    early = retrain_head_here(shards, CLASSES, HeadSettings(penalty, tolerance=float(first) / _EARLY))
    own = (f @ head.weights.T).argmax(1)
    return {
        "error": largest_error(head, f, labels, queries),
        "error_early": largest_error(early, f, labels, queries),
        "error_distilled": largest_error(head, f, own, queries),
        "gradient": head.gradient_norm,
        "iterations": head.iterations,
        "accuracy": float((logits(head, queries).argmax(1) == truth).double().mean()),
    }


def logits(head: Head, queries: Tensor) -> Tensor:  # [Q, H] -> [Q, K]
    return queries.double() @ head.weights.T


def largest_error(head: Head, f: Tensor, labels: Tensor, queries: Tensor) -> float:
    """Return max |Σ_i α_i (f_i · f(q)) − logit| over queries and classes."""
    alpha = coefficients(head, f, labels)
    sums = torch.stack([representer_values(alpha, f, one[None])[:, 0].sum(0) for one in queries])
    return float((sums - logits(head, queries)).abs().max())


def gates(config: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[Gate]:
    worst = {name: max(one[name] for one in results.values()) for name in FIGURES}
    return [
        Gate(
            "largest distance of a logit from its sum of representer values",
            worst["error"],
            threshold=1e-8,
            at_least=False,
        ),
        Gate("largest gradient of a retrained layer", worst["gradient"], threshold=1e-10, at_least=False),
        Gate("the same, stopped at a 200th of the first gradient", worst["error_early"]),
        Gate("the same, α from the layer's own answers", worst["error_distilled"]),
        Gate("steps of L-BFGS, at most", worst["iterations"]),
        Gate("accuracy on test reviews, at most", worst["accuracy"]),
    ]


EXPERIMENT = Experiment(
    "representer.logits", "a stationary last layer's logits are sums over the training examples", 5, cells, run_penalty,
    gates,
)  # fmt: skip
