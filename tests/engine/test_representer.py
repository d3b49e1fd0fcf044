"""The retrained head against Newton's method on a dense Hessian, and the decomposition of every logit."""

import sys

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from engine import representer
from engine.representer import (
    Head,
    HeadSettings,
    Partial,
    State,
    add_partials,
    class_scores,
    coefficients,
    representer_values,
    retrain_head,
    retrain_head_here,
    shard_loss,
)
from engine.solvers import finish
from tests.conftest import Caught

SETTINGS = HeadSettings(penalty=0.01)
N, H, K = 60, 5, 3


def data(count: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, H, generator=generator, dtype=torch.float64) + 0.3
    return features, torch.randint(0, K, (count,), generator=generator)


def objective(weights: Tensor, features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Return (1/n) Σ ℓ + λ‖W‖²."""
    own = torch.log_softmax(features @ weights.T, 1)[torch.arange(len(labels)), labels]
    return penalty * (weights**2).sum() - own.sum() / len(labels)


def by_newton(features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Return the stationary head: ten Newton steps with the whole Hessian."""
    flat = torch.zeros(K * H, dtype=torch.float64)

    def value(w: Tensor) -> Tensor:
        return objective(w.view(K, H), features, labels, penalty)

    for _ in range(10):
        flat = flat - torch.linalg.solve(hessian(value, flat), jacobian(value, flat))
    return flat.view(K, H)


def by_autograd(weights: Tensor, features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Return α, [n, K], from ∂ℓ/∂φ as autograd has it."""
    logits = (features @ weights.T).requires_grad_(True)
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), logits)
    return -slope / (2 * penalty * len(features))


def fitted(shards: int = 1, settings: HeadSettings = SETTINGS) -> Head:
    features, labels = data()
    parts = list(zip(features.chunk(shards), labels.chunk(shards), strict=True))
    return retrain_head_here(parts, K, settings)


@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-4])
def test_the_head_is_the_minimum_and_its_gradient_is_as_small_as_required(penalty: float) -> None:
    head, (features, labels) = fitted(settings=HeadSettings(penalty)), data()
    weights = head.weights.clone().requires_grad_(True)
    value = objective(weights, features, labels, penalty)
    (gradient,) = torch.autograd.grad(value, weights)
    assert head.gradient_norm <= 1e-10
    assert float(gradient.norm()) == pytest.approx(head.gradient_norm, abs=1e-14)
    assert head.objective == pytest.approx(float(value.detach()), rel=1e-12)
    assert torch.allclose(head.weights, by_newton(features, labels, penalty), rtol=0, atol=2 * head.error)


def test_every_logit_is_the_sum_over_the_training_examples(caught: Caught) -> None:
    (features, labels), (queries, _) = data(), data(9, seed=5)

    def compare() -> None:
        head = fitted()
        alpha = coefficients(head, features, labels)
        values = representer_values(alpha, features, queries)
        assert values.shape == (N, 9, K)
        assert torch.allclose(values.sum(0), queries @ head.weights.T, rtol=0, atol=1e-8)
        assert torch.allclose(alpha.T @ features, head.weights, rtol=0, atol=1e-8)
        assert float((head.weights - alpha.T @ features).norm()) == pytest.approx(head.error, rel=1e-3)
        assert torch.allclose(alpha, by_autograd(head.weights, features, labels, 0.01), rtol=1e-10)

    residuals, solved = representer._residuals, representer.coefficients
    caught(compare, representer, "_residuals", lambda logits, labels: torch.softmax(logits, 1))  # labels left out
    assert torch.equal(residuals(torch.zeros(1, 2), torch.tensor([1])), torch.tensor([[0.5, -0.5]]))
    for wrong in (-1.0, 2.0, N):  # sign, λ for 2λ, n left out
        mutant = lambda *given, wrong=wrong: wrong * solved(*given)  # noqa: E731
        caught(compare, sys.modules[__name__], "coefficients", mutant)


def test_a_class_s_scores_are_its_column_and_labels_raise_their_own_logit() -> None:
    features, labels = data()
    head, queries, classes = fitted(), data(4, seed=3)[0], torch.tensor([2, 0, 1, 2])
    alpha = coefficients(head, features, labels)
    whole = representer_values(alpha, features, queries)
    found = class_scores(alpha, features, queries, classes)
    assert torch.equal(found, torch.stack([whole[:, q, c] for q, c in enumerate(classes.tolist())], 1))
    own = alpha[torch.arange(N), labels]
    assert bool((own > 0).all())  # an example raises the logit of its own label where features agree
    assert bool((alpha.sum(1).abs() < 1e-12).all())


def test_shards_add_up_to_the_whole() -> None:
    whole = fitted()
    for shards in (2, 7):
        parted = fitted(shards)
        assert torch.allclose(parted.weights, whole.weights, rtol=0, atol=2 * (whole.error + parted.error))
        assert parted.count == N
    empty = add_partials([shard_loss(whole.weights, torch.zeros(0, H), torch.zeros(0, dtype=torch.int64)),
                          shard_loss(whole.weights, *data())])  # fmt: skip
    alone = shard_loss(whole.weights, *data())
    assert torch.equal(empty.gradient, alone.gradient)
    assert empty.count == N


def test_order_does_not_matter_and_half_precision_features_are_widened() -> None:
    features, labels = data()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    head = retrain_head_here([(features[order], labels[order])], K, SETTINGS)
    assert torch.allclose(head.weights, fitted().weights, rtol=0, atol=2 * (head.error + fitted().error))
    half = features.half()
    head = retrain_head_here([(half, labels)], K, SETTINGS)
    assert torch.equal(head.weights, retrain_head_here([(half.double(), labels)], K, SETTINGS).weights)


def test_the_solver_goes_on_from_a_state_to_the_same_bits() -> None:
    def total(weights: Tensor) -> Partial:
        return shard_loss(weights, *data())

    states: list[State] = []
    whole = finish(retrain_head(total, K, H, SETTINGS), states.append)
    again = finish(retrain_head(total, K, H, SETTINGS, states[len(states) // 2]))
    assert torch.equal(again.weights, whole.weights)
    assert again.iterations == whole.iterations == len(states)


def test_duplicates_of_an_example_share_its_value() -> None:
    features, labels = data()
    shards = [(torch.cat([features, features]), torch.cat([labels, labels]))]
    head = retrain_head_here(shards, K, SETTINGS)
    assert torch.allclose(head.weights, fitted().weights, rtol=0, atol=2 * (head.error + fitted().error))
    alpha = coefficients(head, *shards[0])
    assert torch.allclose(alpha[:N], alpha[N:])
    assert torch.allclose(2 * alpha[:N], coefficients(fitted(), features, labels), rtol=0, atol=1e-6)


def test_a_head_that_is_not_stationary_is_refused() -> None:
    with pytest.raises(FloatingPointError, match=r"not stationary after 3 iterations: .* required 1e-10"):
        fitted(settings=HeadSettings(0.01, max_iterations=3))


def test_a_tolerance_below_rounding_ends_and_says_so() -> None:
    with pytest.raises(FloatingPointError, match="not stationary after 60 iterations"):
        fitted(settings=HeadSettings(0.01, tolerance=1e-19, max_iterations=60))


def test_features_that_are_not_finite_labels_outside_and_no_penalty_are_refused() -> None:
    features, labels = data()
    features[3, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="a feature is NaN or infinite"):
        retrain_head_here([(features, labels)], K, SETTINGS)
    with pytest.raises(ValueError, match="label 2 is outside the head's 2 classes"):
        retrain_head_here([data()], 2, SETTINGS)
    with pytest.raises(ValueError, match=r"penalty=0.0 is not allowed"):
        HeadSettings(0.0)
