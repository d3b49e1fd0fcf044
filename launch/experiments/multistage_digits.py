"""What the multi-stage experiments train: a convolutional network on some of MNIST's digits, then on others; all in float64.

Two convolutions with tanh are the embedding W, one linear layer is U or Θ (the paper's table of architectures is lost).
Each convolution is written as a matrix product over patches, several times as fast in float64 as torch's own. Every objective
is the mean loss plus ½ l2 ‖·‖²; leaving an example out takes its term from that mean and keeps the divisor: ε = −1/m.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch
from engine.counters import derive_key
from engine.curvature import Curvature, Examples, LocalOperator, directional_derivatives
from engine.minimum import MeanLoss
from engine.multistage import Shared, shared_places
from launch.experiments.subjects import ROOT

CHUNK = 512  # images differentiated at a time
SHARED = {
    f"embed.{layer}.{kind}": f"embed.{layer}.{kind}" for layer in ("first", "second") for kind in ("weight", "bias")
}


class Embedding(nn.Module):
    """Patches of an image [B, places, pixels] to features [B, width]: two convolutions, each followed by tanh."""

    def __init__(self, side: int, first: int, second: int, kernels: tuple[int, int], strides: tuple[int, int]) -> None:
        super().__init__()
        self.first = nn.Linear(kernels[0] ** 2, first)
        self.second = nn.Linear(kernels[1] ** 2 * first, second)
        inner = (side - kernels[0]) // strides[0] + 1
        grid = torch.arange(inner**2).view(inner, inner)
        patches = grid.unfold(0, kernels[1], strides[1]).unfold(1, kernels[1], strides[1])
        self.patches: Tensor
        self.register_buffer("patches", patches.reshape(-1, kernels[1] ** 2), persistent=False)
        self.width = len(self.patches) * second

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))[:, self.patches].flatten(2)
        return torch.tanh(self.second(hidden)).flatten(1)


class Digits(nn.Module):
    """The network of one stage; with an identity for its embedding, the head alone on features made before."""

    def __init__(self, embed: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.embed, self.head = embed, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def network(config: dict[str, Any], classes: int, seed: int) -> Digits:
    """Return a network with new weights, float64."""
    torch.manual_seed(derive_key(seed, "weights") % 2**31)
    made = config["network"]
    embed = Embedding(28, made["first"], made["second"], tuple(made["kernels"]), tuple(made["strides"]))
    return Digits(embed, embed.width, classes).double()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return [B]."""
    return F.cross_entropy(model(batch["x"]), batch["target"], reduction="none")


def images(config: dict[str, Any], digits: Sequence[int], rows: slice) -> Batch:
    """Return these rows, in file order, of the images of some digits, as patches; classes in the digits' order."""
    with np.load(ROOT / config["data"]) as data:
        pixels, labels = data["images"], data["labels"]
    chosen = np.flatnonzero(np.isin(labels, digits))[rows]
    x = torch.from_numpy(pixels[chosen]).double()[:, None] / 255
    made = config["network"]
    patches = F.unfold(x, made["kernels"][0], stride=made["strides"][0]).transpose(1, 2).contiguous()
    target = torch.tensor([list(digits).index(label) for label in labels[chosen]])
    return Batch(torch.from_numpy(chosen), {"x": patches, "target": target})


def rows_of(batch: Batch, rows: Tensor | slice) -> Batch:
    return Batch(batch.ids[rows], {name: tensor[rows] for name, tensor in batch.tensors.items()})


@dataclass(frozen=True)
class Pull:
    """α ‖W − W̄‖² of an objective."""

    alpha: float
    places: Tensor  # of W
    centre: Tensor  # W̄


class Objective(MeanLoss):
    """A stage's objective, in which an example can be left out and W held near W̄."""

    model: Digits

    def __init__(self, model: Digits, examples: Batch, l2: float, pull: Pull | None = None) -> None:
        chunks = [rows_of(examples, rows) for rows in torch.arange(len(examples)).split(CHUNK)]
        super().__init__(model, cross_entropy, chunks, l2)
        self.examples, self.pull = examples, pull

    def slope(self, x: Tensor, without: int | None = None) -> tuple[float, Tensor]:
        """Return the objective and its gradient, one example's term taken out of the mean if asked for."""
        value, gradient = super().slope(x)
        if without is not None:
            loss, own = self.summed(x, rows_of(self.examples, slice(without, without + 1)))
            value, gradient = value - loss / len(self.examples), gradient - own / len(self.examples)
        if self.pull:
            away = x.detach()[self.pull.places] - self.pull.centre
            value += self.pull.alpha * float(away @ away)
            gradient[self.pull.places] += 2 * self.pull.alpha * away
        return value, gradient

    def hessian(self, x: Tensor) -> Tensor:
        """Return the whole matrix at x, α's term with it."""
        matrix = super().hessian(x)
        if self.pull:
            matrix[self.pull.places, self.pull.places] += 2 * self.pull.alpha
        return matrix

    def operator(self, x: Tensor) -> LocalOperator:
        """Return the Hessian at x, without α's term."""
        self.put(x)
        curvature = Curvature(self.model, cross_entropy, self.space, "hessian", torch.float64)
        return LocalOperator(curvature, Examples(self.examples.ids, [self.batches], self._gather), self.l2)

    def _gather(self, positions: Tensor) -> list[Batch]:
        return [rows_of(self.examples, positions)]

    def along(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return ∇ℓ(z) · direction of every example, [n]; no L2 term is in it."""
        self.put(x)
        parts = [directional_derivatives(self.model, cross_entropy, self.space, c, direction)[1] for c in self.batches]
        return torch.cat(parts)


def adam(objective: Objective, x: Tensor, epochs: int, batch_size: int, rate: float, seed: int) -> Tensor:
    """Return the weights after Adam on random batches, as the paper trains both stages."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    generator = torch.Generator().manual_seed(derive_key(seed, "order") % 2**31)
    for _ in range(epochs):
        for rows in torch.randperm(len(objective.examples), generator=generator).split(batch_size):
            loss = objective.losses(x, rows_of(objective.examples, rows)).mean() + objective.l2 / 2 * x.square().sum()
            x.grad = torch.autograd.grad(loss, x)[0]
            optimizer.step()
    return x.detach()


def accuracy(objective: Objective, x: Tensor, batch: Batch) -> float:
    """Return the share of these examples whose likeliest class is right."""
    objective.put(x)
    with torch.no_grad():
        return float((objective.model(batch["x"]).argmax(1) == batch["target"]).double().mean())


def on_features(joint: Objective, x: Tensor) -> Objective:
    """Return the head's objective on the features that the embedding gives at x, where the embedding stays as it is."""
    joint.put(x)
    with torch.no_grad():
        features = torch.cat([joint.model.embed(chunk["x"]) for chunk in joint.batches])
    model = Digits(nn.Identity(), features.shape[1], joint.model.head.out_features).double()
    return Objective(model, Batch(joint.examples.ids, joint.examples.tensors | {"x": features}), joint.l2)


def places(pretraining: Objective, finetuning: Objective) -> Shared:
    return shared_places(pretraining.space, finetuning.space, SHARED)
