"""What the multi-stage experiments train: a convolutional network on some of MNIST's digits, then on others; all in float64.

Two convolutions with tanh are the embedding W, one linear layer is U or Θ (the paper's table of architectures is lost).
Each convolution is written as a matrix product over patches, several times as fast in float64 as torch's own. Every objective
is the mean loss plus ½ l2 ‖·‖²; leaving an example out takes its term from that mean and keeps the divisor: ε = −1/m.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch
from engine.coordinates import Coordinates, chosen_coordinates
from engine.counters import derive_key
from engine.curvature import Curvature, Examples, LocalOperator, directional_derivatives, losses_at
from engine.multistage import Shared, shared_places
from launch.experiments.subjects import ROOT

CHUNK = 512  # images differentiated at a time
COLUMNS = 128  # of a Hessian made at a time
PIECE = 5  # steps of L-BFGS between two looks at the gradient
STALLED = 1e4  # times the tolerance: how near plain steps are tried
FLOOR = 1e-6  # least eigenvalue that a step is scaled by
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


@dataclass
class Objective:
    """The mean loss of a stage's examples with its L2 term, as a function of the chosen weights in one vector."""

    model: "Digits"
    examples: Batch
    l2: float
    names: Sequence[str] = ("*",)  # of the chosen weights
    pull: Pull | None = None
    space: Coordinates = field(init=False)

    def __post_init__(self) -> None:
        self.space = chosen_coordinates(self.model, self.names)
        self.chunks = [rows_of(self.examples, rows) for rows in torch.arange(len(self.examples)).split(CHUNK)]

    @property
    def weights(self) -> Tensor:
        named = dict(self.model.named_parameters())
        return self.space.flat([named[w.name].detach() for w in self.space.weights]).clone()

    def losses(self, x: Tensor, batch: Batch) -> Tensor:
        return losses_at(self.model, cross_entropy, self.space, self.space.tensors(x), batch)

    def slope(self, x: Tensor, without: int | None = None) -> tuple[float, Tensor]:
        """Return the objective and its gradient, one example's term taken out of the mean if asked for."""
        signed = [(1.0, chunk) for chunk in self.chunks]
        if without is not None:
            signed.append((-1.0, rows_of(self.examples, slice(without, without + 1))))
        x = x.detach().requires_grad_()
        value, gradient = 0.0, torch.zeros_like(x)
        for sign, batch in signed:
            loss = sign * self.losses(x, batch).sum() / len(self.examples)
            gradient += torch.autograd.grad(loss, x)[0]
            value += loss.item()
        x = x.detach()
        value, gradient = value + self.l2 / 2 * float(x @ x), gradient + self.l2 * x
        if self.pull:
            away = x[self.pull.places] - self.pull.centre
            value += self.pull.alpha * float(away @ away)
            gradient[self.pull.places] += 2 * self.pull.alpha * away
        return value, gradient

    def operator(self, x: Tensor) -> LocalOperator:
        """Return the Hessian at x, without α's term."""
        self.put(x)
        curvature = Curvature(self.model, cross_entropy, self.space, "hessian", torch.float64)
        return LocalOperator(curvature, Examples(self.examples.ids, [self.chunks], self._gather), self.l2)

    def _gather(self, positions: Tensor) -> list[Batch]:
        return [rows_of(self.examples, positions)]

    def hessian(self, x: Tensor) -> Tensor:
        """Return the whole matrix at x, α's term with it."""
        operator = self.operator(x)
        columns = [operator.apply(part) for part in torch.eye(len(x), dtype=torch.float64).split(COLUMNS, 1)]
        matrix = torch.cat(columns, 1)
        matrix = (matrix + matrix.T) / 2
        if self.pull:
            matrix[self.pull.places, self.pull.places] += 2 * self.pull.alpha
        return matrix

    def along(self, x: Tensor, direction: Tensor) -> Tensor:
        """Return ∇ℓ(z) · direction of every example, [n]; no L2 term is in it."""
        self.put(x)
        parts = [directional_derivatives(self.model, cross_entropy, self.space, c, direction)[1] for c in self.chunks]
        return torch.cat(parts)

    def summed(self, x: Tensor, batch: Batch) -> tuple[float, Tensor]:
        """Return the sum of other examples' losses at x and its gradient: what is asked about."""
        x = x.detach().requires_grad_()
        total = self.losses(x, batch).sum()
        return total.item(), torch.autograd.grad(total, x)[0]

    def put(self, x: Tensor) -> None:
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for weight, tensor in zip(self.space.weights, self.space.tensors(x), strict=True):
                named[weight.name].copy_(tensor)


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


def settle(objective: Objective, x: Tensor, steps: int, rounds: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return a minimum, where the gradient is at most tolerance long, and the Hessian there.

    L-BFGS from x, then L-BFGS in coordinates in which the Hessian, its eigenvalues made positive, is the identity. Raises
    FloatingPointError if that ends elsewhere, with a negative eigenvalue or a longer gradient.
    """
    x, _ = descend(objective.slope, x, torch.eye(len(x), dtype=x.dtype), tolerance, steps)
    for _ in range(rounds):
        matrix = objective.hessian(x)
        lowest = float(torch.linalg.eigvalsh(matrix)[0])
        if lowest > 0 and float(objective.slope(x)[1].norm()) <= tolerance:
            return x, matrix
        x, _ = descend(objective.slope, x, scaling_of(matrix), tolerance, steps)
    raise FloatingPointError(f"no minimum: lowest eigenvalue {lowest:.2g}, take more rounds than {rounds}")


def scaling_of(hessian: Tensor) -> Tensor:
    """Return |H|^-½ for `descend`."""
    mu, vectors = torch.linalg.eigh(hessian)
    return vectors * mu.abs().clamp(min=FLOOR).rsqrt()


def descend(
    slope: Callable[[Tensor], tuple[float, Tensor]],  # value and gradient
    x: Tensor,
    scaling: Tensor,  # (p, p): x moves by scaling × what L-BFGS moves; H^-½ makes its first step Newton's
    tolerance: float,
    steps: int,
) -> tuple[Tensor, int]:
    """Return where the gradient is at most tolerance long, or where the steps ended, and the number of evaluations."""
    y, start, length, evaluations = x.new_zeros(len(x), requires_grad=True), x, torch.inf, 0
    search = torch.optim.LBFGS([y], max_iter=PIECE, max_eval=2 * PIECE, history_size=60, tolerance_grad=0,
                               tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> float:
        nonlocal length, evaluations
        value, gradient = slope(start + scaling @ y.detach())
        y.grad, length, evaluations = scaling.T @ gradient, float(gradient.norm()), evaluations + 1
        return value

    for _ in range(steps // PIECE):
        search.step(closure)
        x = start + scaling @ y.detach()
        if length <= STALLED * tolerance:
            nearer = polished(slope, x, scaling, tolerance)
            if float(slope(nearer)[1].norm()) <= tolerance:
                return nearer, evaluations
    return x, evaluations


def polished(slope: Callable[[Tensor], tuple[float, Tensor]], x: Tensor, scaling: Tensor, tolerance: float) -> Tensor:
    """Return x after plain steps with the Hessian that scaling stands for, as long as they shorten the gradient.

    Near the minimum the value no longer changes in its last digit, so a line search stalls before the gradient vanishes.
    """
    gradient = slope(x)[1]
    while float(gradient.norm()) > tolerance:
        nearer = x - scaling @ (scaling.T @ gradient)
        after = slope(nearer)[1]
        if not float(after.norm()) < float(gradient.norm()):
            return x
        x, gradient = nearer, after
    return x


def accuracy(objective: Objective, x: Tensor, batch: Batch) -> float:
    """Return the share of these examples whose likeliest class is right."""
    objective.put(x)
    with torch.no_grad():
        return float((objective.model(batch["x"]).argmax(1) == batch["target"]).double().mean())


def on_features(joint: Objective, x: Tensor) -> Objective:
    """Return the head's objective on the features that the embedding gives at x, where the embedding stays as it is."""
    joint.put(x)
    with torch.no_grad():
        features = torch.cat([joint.model.embed(chunk["x"]) for chunk in joint.chunks])
    model = Digits(nn.Identity(), features.shape[1], joint.model.head.out_features).double()
    return Objective(model, Batch(joint.examples.ids, joint.examples.tensors | {"x": features}), joint.l2)


def places(pretraining: Objective, finetuning: Objective) -> Shared:
    return shared_places(pretraining.space, finetuning.space, SHARED)
