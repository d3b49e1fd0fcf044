"""Solvers against eigenvalue filters, on matrices and on a model; resumed from every state to the same bits."""

import io
import math
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import solvers
from engine.solvers import (
    conjugate_gradient,
    exact,
    finish,
    largest_eigenvalue,
    squared_gradient,
)
from tests import oracles
from tests.oracles import MatrixOperator, filtered

P = 12


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Return a random symmetric matrix with these eigenvalues."""
    draw = torch.randn(len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(seed)).double()
    basis = torch.linalg.qr(draw).Q
    return basis @ torch.diag(eigenvalues) @ basis.T


DEFINITE = symmetric(torch.logspace(-2, 0, P, dtype=torch.float64))
INDEFINITE = symmetric(torch.cat([-torch.logspace(-2, -0.5, P // 3), torch.logspace(-2, 0, P - P // 3)]).double())


def one(matrix: Tensor) -> MatrixOperator:
    return MatrixOperator(matrix[None])


def right(k: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(P, k, generator=torch.Generator().manual_seed(seed)).double()


def reloaded(state: Any) -> Any:
    """Return the state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def resumes_at_every_state(solver: Callable[..., Generator]) -> None:
    """Assert that the solver, started again from any state it yields, ends in the same bits."""
    states: list[Any] = []
    whole = finish(solver(), lambda state: states.append(reloaded(state)))
    assert len(states) > 2
    x = getattr(whole, "x", whole)
    for state in states:
        rest: list[Any] = []
        again = finish(solver(state=state), rest.append)
        same = getattr(again, "x", again)
        assert torch.equal(same, x) if isinstance(x, Tensor) else same == x
        assert len(rest) < len(states)


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_cg_is_the_filter_of_the_inverse(damping: float, caught: Callable) -> None:
    b = right()
    truth = filtered(DEFINITE, b, lambda mu: 1 / (mu + damping))

    def compare() -> None:
        found = finish(conjugate_gradient(one(DEFINITE), b, damping, 1.0, tolerance=1e-12))
        assert oracles.relative_error(found.x, truth) < 1e-10
        assert found.converged.all()

    caught(
        compare, solvers, "squares", lambda block: block.square().mean(0) if block.shape[1] < 3 else block.abs().sum(0)
    )


@pytest.mark.parametrize("damping", [1e-1, 1e-4, 1e-8])
def test_squared_cg_is_its_filter_on_an_indefinite_matrix(damping: float) -> None:
    b = right()
    found = finish(squared_gradient(one(INDEFINITE), b, damping, 1.0, tolerance=1e-13, max_iterations=60))
    assert oracles.relative_error(found.x, filtered(INDEFINITE, b, lambda mu: mu / (mu**2 + damping))) < 1e-9
    assert oracles.relative_error(found.x, filtered(INDEFINITE, b, lambda mu: 1 / (mu + damping))) > 1e-9
    assert found.converged.all()


def test_the_squared_system_needs_its_second_product_and_its_target(caught: Callable) -> None:
    b = right()
    truth = filtered(DEFINITE, b, lambda mu: mu / (mu**2 + 0.05))

    def compare() -> None:
        found = finish(squared_gradient(one(DEFINITE), b, 0.05, 1.0, tolerance=1e-12))
        assert oracles.relative_error(found.x, truth) < 1e-10

    whole, calls = solvers.applied, [0]

    def once(operator: MatrixOperator, block: Tensor, ids: Tensor | None = None) -> Tensor:
        """Leave out every second product of the squared system: H + λI in the place of H² + λI."""
        calls[0] += 1
        return whole(operator, block, ids) if calls[0] % 2 else block

    def untargeted(operator: MatrixOperator, block: Tensor, ids: Tensor | None = None) -> Tensor:
        return block if block is b else whole(operator, block, ids)

    caught(compare, solvers, "applied", once)
    caught(compare, solvers, "applied", untargeted)


def test_the_squared_filter_keeps_the_sign_of_an_eigenvalue_and_peaks_at_the_root_of_the_damping() -> None:
    mu = torch.linspace(-1, 1, P, dtype=torch.float64)
    gain = finish(squared_gradient(one(torch.diag(mu)), torch.ones(P, 1).double(), 1e-2, 1.0, 1e-13)).x[:, 0]
    assert torch.equal(gain.sign(), mu.sign())
    assert float(gain.max()) <= 1 / (2 * math.sqrt(1e-2))


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_plain_cg_refuses_negative_curvature(damping: float) -> None:
    with pytest.raises(FloatingPointError, match=r"negative curvature at iteration .* squared CG"):
        finish(conjugate_gradient(one(INDEFINITE), right(), damping, 1.0))
    enough = finish(conjugate_gradient(one(INDEFINITE), right(), 0.5, 1.0, 1e-12))  # above −μ_min: definite
    assert enough.converged.all()


@pytest.mark.parametrize(("kind", "function"), [("inverse", lambda mu: 1 / (mu + 0.2)),
                                               ("squared", lambda mu: mu / (mu**2 + 0.2))])  # fmt: skip
def test_the_exact_solve_is_either_filter(kind: str, function: Callable) -> None:
    found = finish(exact(one(INDEFINITE), right(), 0.2, kind, columns=5))
    assert oracles.relative_error(found.x, filtered(INDEFINITE, right(), function)) < 1e-12
    assert found.converged.all()


def test_columns_with_their_own_convergence_are_solved_together() -> None:
    vectors = torch.linalg.eigh(DEFINITE)[1]
    b = torch.cat([vectors[:, :1], torch.zeros(P, 1).double(), right(1)], 1)  # one step, none, all
    together = finish(conjugate_gradient(one(DEFINITE), b, 0.01, 1.0, 1e-10))
    alone = [finish(conjugate_gradient(one(DEFINITE), b[:, j : j + 1], 0.01, 1.0, 1e-10)) for j in range(3)]
    assert [a.iterations for a in alone][:2] == [1, 0]
    assert abs(together.iterations - alone[2].iterations) <= 1  # sums over a column round by the block's width
    assert torch.allclose(together.x, torch.cat([a.x for a in alone], 1), rtol=0, atol=1e-8)
    assert torch.equal(together.residual[1], torch.tensor(0.0).double())


class Counted(MatrixOperator):
    """Counts the columns that products are made for."""

    columns = 0

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        self.columns += block.shape[1]
        return super().apply(block, ids)


def test_a_converged_column_costs_no_further_product() -> None:
    operator = Counted(DEFINITE[None])
    b = torch.cat([torch.linalg.eigh(DEFINITE)[1][:, :1], right(1)], 1)
    found = finish(conjugate_gradient(operator, b, 0.01, 1.0, 1e-10))
    assert operator.columns == 1 + found.iterations + 2  # and both columns once for the true residual


def test_power_iteration_finds_the_largest_size_of_an_eigenvalue() -> None:
    for matrix in (DEFINITE, -2 * DEFINITE, INDEFINITE):
        values: list[float] = []
        found = finish(largest_eigenvalue(one(matrix), tolerance=1e-6, max_iterations=500),
                       lambda state, values=values: values.append(state.value))  # fmt: skip
        truth = float(torch.linalg.eigvalsh(matrix).abs().max())
        assert 0.995 * truth < found <= truth * (1 + 1e-12)
        assert values == sorted(values)
    assert finish(largest_eigenvalue(one(torch.zeros(P, P).double()))) == 0


def test_every_solver_resumes_to_the_same_bits() -> None:
    b = right()
    resumes_at_every_state(lambda **k: conjugate_gradient(one(DEFINITE), b, 0.01, 1.0, 1e-10, **k))
    resumes_at_every_state(lambda **k: squared_gradient(one(INDEFINITE), b, 1e-3, 1.0, 1e-10, **k))
    resumes_at_every_state(lambda **k: exact(one(INDEFINITE), b, 0.2, columns=3, **k))
    resumes_at_every_state(lambda **k: largest_eigenvalue(one(INDEFINITE), tolerance=1e-9, **k))


def test_the_figures_are_those_of_the_answer() -> None:
    b = right()
    found = finish(conjugate_gradient(one(DEFINITE), b, 0.01, 1.0, 1e-12, max_iterations=4))
    left = b - DEFINITE @ found.x - 0.01 * found.x
    assert torch.allclose(found.residual, left.norm(dim=0) / b.norm(dim=0), rtol=1e-8)
    assert not found.converged.any()
    assert (found.iterations, found.damping, found.largest) == (4, 0.01, 1.0)
    assert torch.allclose(found.identity, torch.cosine_similarity(found.x, b, dim=0))
    heavy = finish(conjugate_gradient(one(DEFINITE), b, 1000.0, 1.0))
    assert (heavy.identity > 0.999).all()  # a vacuous damping shows


def test_a_recurrence_that_lies_is_found_out() -> None:
    class Rounded(MatrixOperator):
        """Products with an error that no float64 iteration sees."""

        def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
            return super().apply(block, ids).half().double()

    found = finish(conjugate_gradient(Rounded(DEFINITE[None]), right(), 0.01, 1.0, 1e-9, max_iterations=60))
    assert not found.converged.any()


def test_a_squared_system_that_float32_cannot_resolve_is_flagged() -> None:
    class Single(MatrixOperator):
        def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
            return (self.matrices.mean(0).float() @ block.float()).double()

    matrix = symmetric(torch.cat([-torch.logspace(-5, -3, P // 2), torch.logspace(-4, 0, P // 2)]).double())
    truth = filtered(matrix, right(), lambda mu: mu / (mu**2 + 1e-8))
    narrow, wide = (
        finish(squared_gradient(kind(matrix[None]), right(), 1e-8, 1.0, 1e-12, max_iterations=60))
        for kind in (Single, MatrixOperator)
    )
    assert oracles.relative_error(wide.x, truth) < 1e-4
    assert wide.converged.all()
    assert oracles.relative_error(narrow.x, truth) > 1e-3
    assert not narrow.converged.any()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_answer_is_linear_in_the_right_hand_side(scale: float) -> None:
    for solve in (conjugate_gradient, squared_gradient):
        plain, scaled = (finish(solve(one(DEFINITE), c * right(), 0.01, 1.0, 1e-12)).x for c in (1.0, scale))
        assert oracles.relative_error(scaled / scale, plain) < 1e-8


def test_refusals() -> None:
    with pytest.raises(ValueError, match="damping=-0.1"):
        finish(conjugate_gradient(one(DEFINITE), right(), -0.1, 1.0))
    with pytest.raises(ValueError, match=r"needs finite \(12, k\)"):
        finish(conjugate_gradient(one(DEFINITE), right()[1:], 0.1, 1.0))
    with pytest.raises(ValueError, match="needs finite"):
        finish(squared_gradient(one(DEFINITE), right() * torch.nan, 0.1, 1.0))
    with pytest.raises(FloatingPointError, match="product is not finite"):
        finish(conjugate_gradient(one(DEFINITE * torch.inf), right(), 0.1, 1.0))
    with pytest.raises(FloatingPointError, match="singular"):
        finish(exact(one(torch.diag(torch.arange(P)).double()), right(), 0.0))
    with pytest.raises(ValueError, match="at most"):
        finish(
            exact(MatrixOperator(torch.zeros(1, 1, 1).expand(1, 20_000, 20_000)), torch.zeros(20_000, 1).double(), 0.1)
        )


def test_a_matrix_that_is_not_symmetric_diverges_loudly() -> None:
    lopsided = DEFINITE + 3 * torch.triu(torch.ones(P, P).double(), 1) - 3 * torch.tril(torch.ones(P, P).double(), -1)
    with pytest.raises(FloatingPointError, match="diverges"):
        finish(conjugate_gradient(one(lopsided), right(), 0.5, 1.0, max_iterations=500))
