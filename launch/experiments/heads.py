"""Small models whose influence has an exact answer: a head on MiniLM's output averaged over a review's tokens, float64.

    logistic     two classes and an L2 term, at the minimum of its training loss (Newton): convex, so that leaving an
                 example out and training again has one answer
    perceptron   one hidden layer, trained by SGD: its Hessian has eigenvalues of both signs
Influence on them goes through the engine; the training, and the retraining that it is held against, do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch
from engine.coordinates import Coordinates, chosen_coordinates
from engine.curvature import Curvature, Examples, LocalOperator, Operator
from engine.gradients import PerExampleGradients
from engine.methods.contract import join_batches
from engine.parameters import select_parameters
from engine.projectors import Whole
from engine.solvers import ExactState, exact, finish
from engine.training import TrainSettings, train
from launch.experiments.kept import kept
from launch.experiments.subjects import Part, loss, mlp, read_records, token_states

CLASSES = 2
BLOCK_ROWS = 1000  # of a reduction block
_SIGNS = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # of two classes' second derivative, p₀ p₁ times


@dataclass(frozen=True)
class Head:
    """A trained head with its data."""

    train: Part  # float64 [n, H]
    queries: Part
    model: nn.Module  # float64, in evaluation mode
    l2: float  # of ½ l2 ‖θ‖² in its training objective

    @property
    def coordinates(self) -> Coordinates:
        return chosen_coordinates(self.model, ["*"])


def logistic(config: dict[str, Any]) -> Head:
    """Return the logistic head of a config, converged."""
    parts = features(config)
    return Head(parts["train"], parts["test"], as_model(fit(parts["train"], config["l2"])), config["l2"])


def perceptron(config: dict[str, Any]) -> Head:
    """Return the head with one hidden layer of a config, on the first rows of the same features."""
    parts, own = features(config), config["mlp"]
    part = parts["train"].take(torch.arange(own["rows"]))
    torch.manual_seed(own["seed"])
    model = mlp([with_one(part).shape[1] - 1, *own["widths"], CLASSES]).double()

    def collate(rows: list[int]) -> Batch:
        return part.batch(torch.tensor(rows))

    settings = TrainSettings(**own["train"], optimizer="sgd", checkpoints=1, seed=own["seed"])
    for _ in train(model, loss, collate, list(range(own["rows"])), settings):
        pass
    return Head(part, parts["test"], model.eval(), 0.0)


def features(config: dict[str, Any]) -> dict[str, Part]:
    """Return clearly rated movie reviews as MiniLM's output averaged over their tokens, float64 [n, 384]; it is kept."""

    def make() -> dict[str, Tensor]:
        found = {}
        for name, rows in config["rows"].items():
            records = read_records(config["data"].format(part=name))
            records = [record for record in records if abs(record["score"]) >= config["least_score"]][:rows]
            states = token_states(config["base"], None, tuple(r["text"] for r in records), config["max_tokens"])
            found[f"{name}.pooled"] = torch.stack([tokens.mean(0) for tokens in states]).double()
            found[f"{name}.labels"] = torch.tensor([r["label"] for r in records])
        return found

    given = {key: config[key] for key in ("data", "rows", "base", "least_score", "max_tokens")}
    found = kept("pooled", given, make)
    return {name: Part(found[f"{name}.pooled"], found[f"{name}.labels"]) for name in config["rows"]}


def with_one(part: Part) -> Tensor:
    """Return the features [n, D], D = H + 1, with a constant for the bias."""
    assert isinstance(part.inputs, Tensor)
    return F.pad(part.inputs, (0, 1), value=1.0)


def fit(part: Part, l2: float) -> Tensor:
    """Return the weights [2, D], bias last, at the minimum of the mean loss + ½ l2 ‖θ‖²."""
    start = torch.zeros(CLASSES, with_one(part).shape[1], dtype=torch.float64)
    return newton(part, l2, start, torch.ones(1, len(part.labels), dtype=torch.float64))[0]


def retrained_without(part: Part, l2: float, weights: Tensor, left_out: Sequence[int], at_once: int = 8) -> Tensor:
    """Return the weights [m, 2, D] after training again without one example each, from the weights with all."""
    found = []
    for chunk in torch.as_tensor(left_out).split(at_once):
        kept = torch.ones(len(chunk), len(part.labels), dtype=torch.float64)
        kept[torch.arange(len(chunk)), chunk] = 0
        found.append(newton(part, l2, weights, kept))
    return torch.cat(found)


def newton(part: Part, l2: float, start: Tensor, kept: Tensor, tolerance: float = 1e-12) -> Tensor:
    """Return the minimum [2, D] of (Σ_j k_j ℓ_j)/n + ½ l2 ‖θ‖² for every row k of `kept` [m, n]: n stays when k is 0.

    Raises FloatingPointError if 50 steps do not bring the gradient's largest entry below the tolerance.
    """
    x, n = with_one(part), len(part.labels)
    target = F.one_hot(part.labels, CLASSES).double()
    theta = start.expand(len(kept), -1, -1).clone()
    for _ in range(50):
        p = (x @ theta.transpose(1, 2)).softmax(2)  # [m, n, 2]
        gradient = ((p - target) * kept[:, :, None]).transpose(1, 2) @ x / n + l2 * theta
        if float(gradient.abs().max()) <= tolerance:
            return theta
        for i, (weight, slope) in enumerate(zip(kept * p.prod(2), gradient, strict=True)):
            matrix = torch.kron(_SIGNS, x.T @ (x * weight[:, None])) / n
            matrix.diagonal().add_(l2)
            theta[i] -= torch.linalg.solve(matrix, slope.flatten()).view_as(slope)
    raise FloatingPointError(f"the head did not converge: gradient {float(gradient.abs().max()):.2g}, l2={l2}")


def as_model(weights: Tensor) -> nn.Module:  # [2, D]
    """Return the linear model with these weights."""
    model = mlp([weights.shape[1] - 1, CLASSES]).double()
    model.load_state_dict({"0.weight": weights[:, :-1], "0.bias": weights[:, -1]})
    return model.eval()


def as_weights(model: nn.Module) -> Tensor:
    """Return a linear model's weights [2, D], bias last."""
    state = model.state_dict()
    return torch.cat([state["0.weight"], state["0.bias"][:, None]], 1)


def losses_of(part: Part, weights: Tensor) -> Tensor:
    """Return the losses [m, n] of a part under weights [m, 2, D]."""
    logits = with_one(part) @ weights.transpose(1, 2)
    return F.cross_entropy(logits.transpose(1, 2), part.labels.expand(len(weights), -1), reduction="none")


def gradients(head: Head, part: Part) -> Tensor:
    """Return whole per-example gradients of the loss, float64 [n, p]: without the L2 term, which has none."""
    chosen = select_parameters(head.model, ["*"])
    with PerExampleGradients(head.model, chosen, Whole(chosen, stored=False), norms=False) as hooks:
        parts = [hooks(loss, batch) for batch in part.batches()]
    arrays = join_batches(parts)[0]
    order = torch.cat([one.ids for one in parts]).argsort()
    return head.coordinates.join(arrays).T[order]


def operator(head: Head, kind: str = "gauss-newton", dtype: torch.dtype = torch.float64) -> LocalOperator:
    """Return the curvature of the mean training loss, its L2 term included, with products in this dtype."""
    part = Part(head.train.inputs.to(dtype), head.train.labels)  # type: ignore[union-attr]
    ids = torch.arange(len(part.labels))
    blocks = [[part.batch(rows)] for rows in ids.split(BLOCK_ROWS)]
    curvature = Curvature(head.model, loss, head.coordinates, kind, dtype)
    return LocalOperator(curvature, Examples(ids, blocks, lambda chosen: [part.batch(chosen)]), head.l2)


def whole_matrix(curvature: Operator) -> Tensor:
    """Return the operator's matrix (p, p), made column by column."""
    seen: list[ExactState] = []
    nothing = torch.zeros(curvature.size, 1, dtype=torch.float64)
    finish(exact(curvature, nothing, 1.0, "squared"), seen.append)
    return (seen[-1].matrix + seen[-1].matrix.T) / 2


def leverage(head: Head, matrix: Tensor) -> Tensor:
    """Return h [n] of every training example of a logistic head: its own share of the curvature (n times the matrix).

    Leaving example i out takes H_i = a aᵀ away, a = √(p₀p₁) ∇(logit₀ − logit₁), so that one Newton step is longer than the
    influence function's by 1/(1 − h_i), h_i = aᵀ (nH)⁻¹ a (Sherman & Morrison 1950; Pregibon 1981).
    """
    x, weights = with_one(head.train), as_weights(head.model)
    p = (x @ weights.T).softmax(1)
    apart = torch.cat([x[:, :-1], -x[:, :-1], x[:, -1:], -x[:, -1:]], 1)  # in the model's order: weight, bias
    own = p.prod(1).sqrt()[:, None] * apart
    return (own * torch.linalg.solve(matrix, own.T).T).sum(1) / len(x)


class LogisticOperator:
    """The logistic head's curvature by its formula: what `operator` gives, many columns at once."""

    def __init__(self, head: Head) -> None:
        self.size, self._l2, self._width = head.coordinates.size, head.l2, with_one(head.train).shape[1] - 1
        self._x = with_one(head.train)
        self._weight = (self._x @ as_weights(head.model).T).softmax(1).prod(1)

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return curvature × block, (size, k) float64."""
        rows = slice(None) if ids is None else ids
        x, weight, h = self._x[rows], self._weight[rows], self._width
        apart = torch.cat([block[:h] - block[h : 2 * h], block[2 * h : 2 * h + 1] - block[2 * h + 1 :]])
        pushed = x.T @ (weight[:, None] * (x @ apart)) / len(x)  # (D, k)
        pulled = torch.cat([pushed[:h], -pushed[:h], pushed[h:], -pushed[h:]])
        return pulled + self._l2 * block
