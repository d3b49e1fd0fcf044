"""Influence against leaving out and training again, where that can be done exactly: ridge and logistic regression."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import influence
from engine.batches import Batch
from engine.coordinates import chosen_coordinates
from engine.curvature import Curvature, LocalOperator, directional_derivatives
from engine.influence import gram, per_example_loo, projected_solve
from engine.solvers import conjugate_gradient, finish
from tests import oracles
from tests.engine.test_curvature import cut

N, P, Q = 200, 4, 7
L2 = 0.02


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


X, QUERIES = draw(0, N, P), draw(1, Q, P)
REAL = X @ draw(2, P) + draw(3, N)
LABELS = (X @ draw(2, P) + 2 * draw(3, N)).sign()
ASKED = (QUERIES @ draw(2, P) + 2 * draw(4, Q)).sign()


def batch(x: Tensor, y: Tensor) -> Batch:
    return Batch(torch.arange(len(x)), {"x": x, "y": y})


def linear(theta: Tensor) -> nn.Module:
    model = nn.Linear(P, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta[None])
    return model


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"])[:, 0] - batch["y"]).square()


def logistic(model: nn.Module, batch: Batch) -> Tensor:
    return F.softplus(-batch["y"] * model(batch["x"])[:, 0])


def prediction(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"])[:, 0]


def solved(theta: Tensor, loss: Callable, train: Batch, measure: Callable, query: Batch) -> Tensor:
    """Return (H + l2)⁻¹ ∇m(q), (p, Q)."""
    model = linear(theta)
    b = oracles.flat(oracles.gradients(model, measure, query)).T
    curvature = Curvature(model, loss, chosen_coordinates(model, ["*"]), dtype=torch.float64)
    return finish(conjugate_gradient(LocalOperator(curvature, cut(train, 4), l2=L2), b, 0.0, 1.0, 1e-13)).x


def along(theta: Tensor, loss: Callable, train: Batch, block: Tensor) -> Tensor:
    """Return ∇ℓ(z) · x for every example and column, [n, Q]."""
    model = linear(theta)
    chosen = chosen_coordinates(model, ["*"])
    return torch.stack([directional_derivatives(model, loss, chosen, train, x)[1] for x in block.T], 1)


def ridge(x: Tensor, y: Tensor, count: int) -> Tensor:
    """Return the minimum of Σ (xθ − y)² + count · ½ l2 ‖θ‖²."""
    return torch.linalg.solve(2 * x.T @ x + count * L2 * torch.eye(P).double(), 2 * x.T @ y)


def without(i: int) -> Tensor:
    return torch.arange(N) != i


def test_ridge_equals_leaving_out_but_for_the_leverage(caught: Callable) -> None:
    theta = ridge(X, REAL, N)
    inverse = torch.linalg.inv(X.T @ X + N * L2 / 2 * torch.eye(P).double())
    leverage = (X @ inverse * X).sum(1)
    truth = torch.stack([QUERIES @ (ridge(X[without(i)], REAL[without(i)], N) - theta) for i in range(N)])
    block = solved(theta, squared, batch(X, REAL), prediction, batch(QUERIES, ASKED))
    found = along(theta, squared, batch(X, REAL), block)

    def compare() -> None:
        score = influence.per_example_loo(found, N)
        assert oracles.relative_error(score / (1 - leverage)[:, None], truth) < 1e-8

    caught(compare, influence, "per_example_loo", lambda found, count: -found / count)
    caught(compare, influence, "per_example_loo", lambda found, count: found)

    def regularised(model: nn.Module, batch: Batch) -> Tensor:
        return squared(model, batch) + L2 / 2 * sum(w.square().sum() for w in model.parameters())

    with_l2 = per_example_loo(along(theta, regularised, batch(X, REAL), block), N)
    assert oracles.relative_error(with_l2 / (1 - leverage)[:, None], truth) > 1e-3  # the L2 term belongs into H alone
    shrunk = torch.stack([QUERIES @ (ridge(X[without(i)], REAL[without(i)], N - 1) - theta) for i in range(N)])
    assert oracles.relative_error(shrunk, truth) > 1e-3  # and n λ stays as it is when an example leaves


def fit(weights: Tensor) -> Tensor:
    """Return the minimum of Σ w softplus(−y xθ) + n ½ l2 ‖θ‖², by Newton's method to rounding."""
    theta = torch.zeros(P).double()
    for _ in range(9):
        theta = theta - newton_step(theta, weights)
    return theta


def newton_step(theta: Tensor, weights: Tensor) -> Tensor:
    p = torch.sigmoid(-LABELS * (X @ theta))
    gradient = X.T @ (-LABELS * p * weights) + N * L2 * theta
    return torch.linalg.solve(X.T @ ((p * (1 - p) * weights)[:, None] * X) + N * L2 * torch.eye(P).double(), gradient)


def query_losses(theta: Tensor) -> Tensor:
    return F.softplus(-ASKED * (QUERIES @ theta))


THETA = fit(torch.ones(N).double())
LEFT_OUT = torch.stack([query_losses(fit(without(i).double())) - query_losses(THETA) for i in range(N)])


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def logistic_scores() -> Tensor:
    block = solved(THETA, logistic, batch(X, LABELS), logistic, batch(QUERIES, ASKED))
    return per_example_loo(along(THETA, logistic, batch(X, LABELS), block), N)


def test_logistic_follows_leaving_out_with_slope_one() -> None:
    found = logistic_scores()
    assert pearson(found, LEFT_OUT) >= 0.99
    assert 0.95 < float((found * LEFT_OUT).sum() / found.square().sum()) < 1.05
    steps = torch.stack([query_losses(THETA - newton_step(THETA, without(i).double())) for i in range(N)])
    assert pearson(steps - query_losses(THETA), LEFT_OUT) >= 0.999


def test_the_sign_of_a_score_is_what_removing_does() -> None:
    found, columns = logistic_scores(), torch.arange(Q)
    assert (LEFT_OUT[found.argmax(0), columns] > 0).all()  # without its best proponent a query's loss rises
    assert (LEFT_OUT[found.argmin(0), columns] < 0).all()  # without its worst opponent it falls
    harmful = int(found.sum(1).argmin())
    assert query_losses(fit(without(harmful).double())).sum() < query_losses(THETA).sum()


@pytest.mark.parametrize("blocks", [1, 5])
def test_the_projected_solve_is_the_damped_empirical_fisher(blocks: int) -> None:
    rows, queries = draw(5, 50, 9), draw(6, 4, 9)
    matrix = rows.T @ rows / 50 + 0.1 * torch.eye(9).double()
    found = projected_solve(gram(rows.tensor_split(blocks)), 50, queries, 0.1)
    assert oracles.relative_error(found, queries @ torch.linalg.inv(matrix)) < 1e-12
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    again = projected_solve(gram([rows[order].float().double()]), 50, queries, 0.1)
    assert oracles.relative_error(again, found) < 1e-6
    sums = projected_solve(gram([rows]), 1, queries, 0.1)  # GᵀG for GᵀG/n
    assert oracles.relative_error(sums, found) > 0.1


def test_without_damping_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite for 5 rows of 9 columns"):
        projected_solve(gram([draw(5, 5, 9)]), 5, draw(6, 4, 9), 0.0)
    assert torch.isfinite(projected_solve(gram([draw(5, 5, 9)]), 5, draw(6, 4, 9), 0.1)).all()
