"""Representer points: a test example's logits as a sum over the training examples (Yeh et al. 2018, arXiv:1811.09720).

The last layer is trained again, alone and without a bias, on the features f that the rest of the model gives:

    W = argmin (1/n) Σ ℓ(W f_i, y_i) + λ‖W‖²,    hence    W = Σ α_i f_iᵀ  with  α_i = −(1/2λn) ∂ℓ/∂φ_i

and the logits W f(q) are Σ α_i (f_i · f(q)), a number per training example and class. Positive: the example raises that
class's logit. This is no loss and is never added to scores of losses. The labels are the true ones (with the model's own
answers α would vanish where the new layer reproduces them), and a bias that is penalised would be one more feature.
Only features and labels are read, shard by shard.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.curvature import tree_sum
from engine.solvers import finish

SCORE_UNIT = "logit"  # of one class of the retrained head
_HISTORY = 20  # pairs of (step, change of gradient) that L-BFGS keeps
_SLOPE = (0.5, 0.1)  # a step ends where the slope is within −0.5 … 0.1 of its size at the start
_TRIALS = 60  # of one line search


@dataclass(frozen=True)
class HeadSettings:
    """How the last layer is trained again."""

    penalty: float = 0.003  # λ, absolute, of λ‖W‖²
    tolerance: float = 1e-10  # of ‖∇‖ of the whole objective: stationarity is required
    max_iterations: int = 2000

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise ValueError(f"penalty={self.penalty} is not allowed: λ must be > 0. The default is 0.003.")


@dataclass(frozen=True)
class Head:
    """The retrained last layer and what is needed to trust it."""

    weights: Tensor  # float64 (K, H)
    objective: float  # (1/n) Σ ℓ + λ‖W‖²
    gradient_norm: float  # ‖∇‖ of the objective there
    iterations: int
    count: int  # n
    penalty: float  # λ

    @property
    def error(self) -> float:
        """Return ‖W − Σ α_i f_iᵀ‖, which is ‖∇‖/2λ: times ‖f(q)‖, how far the sum is from q's logits at most."""
        return self.gradient_norm / (2 * self.penalty)


@dataclass(frozen=True)
class Partial:
    """A shard's part of the sums over all examples; float64."""

    loss: Tensor  # scalar, Σ ℓ
    gradient: Tensor  # (K, H), Σ ∂ℓ/∂φ fᵀ
    count: int


def shard_loss(weights: Tensor, features: Tensor, labels: Tensor) -> Partial:
    """Return a shard's sums: softmax cross-entropy of logits W f, [n, H] features and int64 [n] class indices."""
    f = features.double()
    if len(labels) and int(labels.max()) >= len(weights):
        raise ValueError(f"label {int(labels.max())} is outside the head's {len(weights)} classes")
    logits = f @ weights.T
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return Partial(loss, _residuals(logits, labels).T @ f, len(f))


def add_partials(partials: Iterable[Partial]) -> Partial:
    """Return the sums over all shards, added in an order that follows from their number alone."""
    parts = list(partials)
    return Partial(tree_sum(p.loss for p in parts), tree_sum(p.gradient for p in parts), sum(p.count for p in parts))


def coefficients(head: Head, features: Tensor, labels: Tensor) -> Tensor:  # float64 [n, K]
    """Return α = −(1/2λn) ∂ℓ/∂φ of a shard's training examples, from their true labels (equation 4 of TracIn's appendix)."""
    residuals = _residuals(features.double() @ head.weights.T, labels)
    return -residuals / (2 * head.penalty * head.count)


def representer_values(alpha: Tensor, features: Tensor, queries: Tensor) -> Tensor:  # [n, K], [n, H], [Q, H]
    """Return α_z (f_z · f_q) for every class, float64 [n, Q, K]; their sum over all z is the query's logits."""
    return alpha[:, None, :] * similarities(features, queries)[:, :, None]


def class_scores(alpha: Tensor, features: Tensor, queries: Tensor, classes: Tensor) -> Tensor:
    """Return α_zc (f_z · f_q) for one class c of each query, int64 [Q], float64 [n, Q]. Never makes the other classes'."""
    return alpha[:, classes] * similarities(features, queries)


def similarities(features: Tensor, queries: Tensor) -> Tensor:
    return features.double() @ queries.double().T


def _residuals(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ∂ℓ/∂φ = softmax(φ) − onehot(y), [n, K]."""
    return torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, logits.shape[1])


@dataclass(frozen=True)
class State:
    """L-BFGS after some iterations; from it the solver goes on to the same bits."""

    iteration: int
    weights: Tensor  # (K, H)
    objective: float
    gradient: Tensor  # (K, H)
    count: int  # n
    steps: tuple[Tensor, ...] = ()  # the last changes of the weights
    changes: tuple[Tensor, ...] = ()  # and of the gradient


def retrain_head(
    total: Callable[[Tensor], Partial],  # weights (K, H) -> the sums over all shards: one pass over the features
    classes: int,  # K
    width: int,  # H
    settings: HeadSettings,
    state: State | None = None,
) -> Generator[State, None, Head]:
    """Return the stationary head by L-BFGS in float64, from zero or from a yielded state. One to three passes a step.

    The objective is strictly convex, so its minimum is the only stationary point. Raises FloatingPointError if it is
    not reached within max_iterations, or if features are not finite.
    """

    def at(weights: Tensor, iteration: int) -> State:
        sums = total(weights)
        gradient = sums.gradient / sums.count + 2 * settings.penalty * weights
        value = float(sums.loss) / sums.count + settings.penalty * float(weights.square().sum())
        if not torch.isfinite(gradient).all():
            raise FloatingPointError(
                "the head's gradient is not finite: a feature is NaN or infinite. Collect them again."
            )
        return State(iteration, weights, value, gradient, sums.count)

    state = state or at(torch.zeros(classes, width, dtype=torch.float64), 0)
    while float(state.gradient.norm()) > settings.tolerance:
        if state.iteration >= settings.max_iterations:
            raise FloatingPointError(
                f"the head is not stationary after {state.iteration} iterations: ‖∇‖ = {float(state.gradient.norm()):.2e}, "
                f"required {settings.tolerance:.0e}. Raise max_iterations, or the penalty (now {settings.penalty:g})."
            )
        state = _step(at, state)
        yield state
    norm = float(state.gradient.norm())
    return Head(state.weights, state.objective, norm, state.iteration, state.count, settings.penalty)


def retrain_head_here(shards: list[tuple[Tensor, Tensor]], classes: int, settings: HeadSettings) -> Head:
    """Return the same from (features, labels) held in memory."""

    def total(weights: Tensor) -> Partial:
        return add_partials(shard_loss(weights, *shard) for shard in shards)

    return finish(retrain_head(total, classes, shards[0][0].shape[1], settings))


def _step(at: Callable[[Tensor, int], State], state: State) -> State:
    """Return the state after one step along the L-BFGS direction, its length found from slopes alone.

    Near the minimum values of the objective differ by less than its rounding, its slopes do not. Along a line of a convex
    function the slope only rises: it is bracketed and its zero approached by secants (Hager & Zhang 2005, approximate
    Wolfe conditions).
    """
    direction = _direction(state)
    first = float((state.gradient * direction).sum())
    low, low_slope, high, high_slope = 0.0, first, None, 0.0
    length = 1.0 if state.steps else min(1.0, 1.0 / float(state.gradient.norm()))
    for _ in range(_TRIALS):
        found = at(state.weights + length * direction, state.iteration + 1)
        slope = float((found.gradient * direction).sum())
        if _SLOPE[0] * first <= slope <= -_SLOPE[1] * first:
            break
        if slope > 0:
            high, high_slope = length, slope
        else:
            low, low_slope = length, slope
        if high is None:
            length *= 4.0
        else:
            secant = (low * high_slope - high * low_slope) / (high_slope - low_slope)
            margin = 0.1 * (high - low)
            length = min(max(secant, low + margin), high - margin)
    step, change = found.weights - state.weights, found.gradient - state.gradient
    if float((step * change).sum()) <= 0:  # rounding alone: start the history anew
        return found
    return replace(
        found,
        steps=(*state.steps, step)[-_HISTORY:],
        changes=(*state.changes, change)[-_HISTORY:],
    )


def _direction(state: State) -> Tensor:
    """Return −H∇ by the two-loop recursion (Nocedal 1980)."""
    direction, kept = -state.gradient, []
    for step, change in zip(reversed(state.steps), reversed(state.changes), strict=True):
        share = (step * direction).sum() / (step * change).sum()
        direction = direction - share * change
        kept.append(share)
    if state.steps:
        direction = direction * (state.steps[-1] * state.changes[-1]).sum() / state.changes[-1].square().sum()
    for step, change, share in zip(state.steps, state.changes, reversed(kept), strict=True):
        direction = direction + (share - (change * direction).sum() / (step * change).sum()) * step
    return direction
