"""LiSSA against its finite filter, the sketch against the inverse; their batches, their errors, their divergence."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine import stochastic_solvers
from engine.solvers import finish
from engine.stochastic_solvers import (
    Lissa,
    Sketch,
    batch_scale,
    draw,
    lissa_repetition,
    lissa_solution,
    sketch_columns,
    sketch_matrix,
    sketch_solution,
    sketch_step,
    sketched,
)
from tests import oracles
from tests.engine.test_solvers import DEFINITE, P, one, resumes_at_every_state, right
from tests.oracles import MatrixOperator, filtered

N = 40


def examples(n: int = N, rank: int = 6, seed: int = 3) -> Tensor:
    """Return n positive semi-definite matrices of low rank, as examples' Gauss-Newton matrices are."""
    factors = torch.randn(n, rank, P, generator=torch.Generator().manual_seed(seed)).double() / rank**0.5
    return factors.transpose(1, 2) @ factors / 4


MANY = MatrixOperator(examples())
MEAN = MANY.matrices.mean(0)
LARGEST = float(torch.linalg.eigvalsh(MEAN).max())
IDS = torch.arange(N)


def repeat(operator: MatrixOperator, b: Tensor, settings: Lissa, largest: float = LARGEST) -> list[Tensor]:
    return [finish(lissa_repetition(operator, b, IDS % len(operator.matrices), settings, t, largest))
            for t in range(settings.repetitions)]  # fmt: skip


@pytest.mark.parametrize("iterations", [1, 7, 50])
def test_one_batch_for_all_gives_the_finite_filter(iterations: int, caught: Callable) -> None:
    settings = Lissa(damping=0.06, scale=1.5, iterations=iterations, repetitions=1)
    truth = filtered(DEFINITE, right(), lambda mu: (1 - (1 - 0.06 / 1.5 - mu / 1.5) ** (iterations + 1)) / (mu + 0.06))

    def compare() -> None:
        (found,) = repeat(one(DEFINITE), right(), settings, 1.0)
        assert oracles.relative_error(found, truth) < 1e-10

    caught(compare, stochastic_solvers, "applied", lambda operator, block, ids: 1.01 * operator.apply(block, ids))


def test_in_the_limit_the_papers_damping_times_scale_is_solved_for() -> None:
    d, s = 0.05, 2.0
    (found,) = repeat(one(DEFINITE), right(), Lissa(d * s, s, iterations=400, repetitions=1), 1.0)
    assert oracles.relative_error(found, filtered(DEFINITE, right(), lambda mu: 1 / (mu + d * s))) < 1e-8
    assert oracles.relative_error(found, filtered(DEFINITE, right(), lambda mu: 1 / (mu + d))) > 0.1


def test_random_batches_are_right_on_average_and_their_error_falls_with_the_root_of_t() -> None:
    scale = batch_scale(MANY, IDS, 2)
    settings = Lissa(0.2 * LARGEST, scale, iterations=20, batch_size=2, repetitions=96)
    b = right(1)
    estimates = repeat(MANY, b, settings)
    truth = filtered(
        MEAN, b, lambda mu: (1 - (1 - (settings.damping + mu) / scale) ** 21) / (mu + settings.damping)
    )  # batches are independent of x, so the mean follows the mean matrix
    whole = lissa_solution(MANY, b, settings, estimates, LARGEST)
    assert whole.standard_error is not None
    block = torch.stack(estimates)
    torch.testing.assert_close(whole.x, block.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.standard_error, block.std(0) / len(block) ** 0.5, rtol=1e-10, atol=1e-14)
    z = (whole.x - truth) / whole.standard_error
    assert float(z.square().mean().sqrt()) < 3
    quarters = [
        lissa_solution(MANY, b, settings, estimates[i : i + 24], LARGEST).standard_error for i in (0, 24, 48, 72)
    ]
    ratio = float(torch.stack([q for q in quarters if q is not None]).norm() / 2 / whole.standard_error.norm())
    assert 1.7 < ratio < 2.3
    biased = lissa_solution(MANY, b, settings, [1.5 * e for e in estimates], LARGEST)
    assert biased.standard_error is not None
    assert float(((biased.x - truth) / biased.standard_error).square().mean().sqrt()) > 3


def test_the_residual_is_of_all_examples() -> None:
    settings = Lissa(0.2 * LARGEST, batch_scale(MANY, IDS, 8), iterations=100, batch_size=8, repetitions=3)
    found = lissa_solution(MANY, right(), settings, repeat(MANY, right(), settings), LARGEST)
    left = right() - MEAN @ found.x - settings.damping * found.x
    assert torch.allclose(found.residual, left.norm(dim=0) / right().norm(dim=0))
    assert lissa_solution(MANY, right(), settings, [found.x], LARGEST).standard_error is None


def test_a_repetition_depends_on_its_number_alone() -> None:
    settings = Lissa(0.1, 2.0, iterations=5, batch_size=3)
    first, second, again = (finish(lissa_repetition(MANY, right(), IDS, settings, t, LARGEST)) for t in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


def test_batches_are_drawn_from_all_examples_and_never_run_out() -> None:
    drawn = torch.cat([draw(IDS + 2**40, 7, j, 8) for j in range(200)])
    counts = torch.bincount(drawn - 2**40, minlength=N)
    assert counts.sum() == 1600
    assert counts.min() > 10
    assert torch.equal(draw(IDS, 7, 3, 8), torch.cat([draw(IDS, 7, 6, 4), draw(IDS, 7, 7, 4)]))  # one stream


def test_stochastic_solvers_resume_to_the_same_bits() -> None:
    settings = Lissa(0.1, 2.0, iterations=12, batch_size=3)
    resumes_at_every_state(lambda **k: lissa_repetition(MANY, right(), IDS, settings, 1, LARGEST, **k))
    sketch = Sketch(0.02, 0.05, iterations=9, batch_size=4)
    resumes_at_every_state(lambda **k: sketch_columns(MANY, right(), IDS, sketch, 0, LARGEST, **k))


def test_the_automatic_scale_covers_the_batches_and_the_repetitions_converge() -> None:
    tops = torch.linalg.eigvalsh(MANY.matrices)[:, -1]
    scale = batch_scale(MANY, IDS, 1)
    assert float(tops.max()) / 2 < scale <= float(tops.max()) * (1 + 1e-9)  # above the limit of every single example
    settings = Lissa(0.3 * LARGEST, scale, iterations=300, repetitions=2)
    assert lissa_solution(MANY, right(), settings, repeat(MANY, right(), settings), LARGEST).residual.max() < 1


@pytest.mark.parametrize("known", [True, False])
def test_a_scale_below_half_the_largest_eigenvalue_is_stopped(known: bool) -> None:
    settings = Lissa(0.01, 0.45, iterations=400, repetitions=1)
    error, words = (ValueError, "must be above 0.505") if known else (FloatingPointError, "diverges at iteration")
    with pytest.raises(error, match=words):
        repeat(one(DEFINITE), right(), settings, 1.0 if known else 0.0)
    repeat(one(DEFINITE), right(), Lissa(0.01, 0.55, iterations=400, repetitions=1), 1.0)


def columns(operator: MatrixOperator, g: Tensor, settings: Sketch, largest: float, block: int = 0) -> Tensor:
    return finish(sketch_columns(operator, g, torch.arange(len(operator.matrices)), settings, block, largest))


def test_the_full_batch_sketch_is_the_inverse() -> None:
    g = right(4)
    flat = MatrixOperator((DEFINITE + 0.3 * torch.eye(P))[None])
    quick = columns(flat, g, Sketch(0.0, sketch_step(1.3), iterations=700), 1.3)
    assert oracles.relative_error(quick, torch.linalg.solve(DEFINITE + 0.3 * torch.eye(P), g)) < 1e-8
    damped = columns(flat, g, Sketch(0.1, 0.2, iterations=500), 1.3)
    truth = filtered(flat.matrices[0], g, lambda mu: mu / (mu**2 + 0.1))
    assert oracles.relative_error(damped, truth) < 1e-8


def test_the_null_space_stays_where_it_started() -> None:
    flat = torch.diag(torch.cat([torch.ones(P - 2), torch.zeros(2)])).double()
    found = columns(one(flat), right(), Sketch(0.0, 0.5, iterations=50), 1.0)
    assert torch.equal(found[-2:], torch.zeros(2, 3).double())
    assert oracles.relative_error(found[:-2], right()[:-2]) < 1e-12


def two_batch_gradient(s: Tensor, g: Tensor, draws: int, same: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard error of 2 H_{B₁}(H_{B₂}S − Gᵀ) over draws, made from the solver's own batches."""
    found = []
    for t in range(draws):
        first, second = stochastic_solvers.sketch_batches(IDS, Sketch(0.0, 0.1, batch_size=2), 0, t)
        inner = MANY.apply(s, first if same else second) - g
        found.append(2 * MANY.apply(inner, first))
    block = torch.stack(found)
    return block.mean(0), block.std(0) / draws**0.5


def test_two_independent_batches_are_unbiased_and_one_for_both_is_not() -> None:
    g = right(2)
    s = torch.linalg.solve(MEAN + 0.1 * torch.eye(P).double(), g)
    truth = 2 * MEAN @ (MEAN @ s - g)
    z = {same: (lambda m, e: float(((m - truth) / e).square().mean().sqrt()))(*two_batch_gradient(s, g, 800, same))
         for same in (False, True)}  # fmt: skip
    assert z[False] < 1.6
    assert z[True] > 3


def same_batch(ids: Tensor, settings: Sketch, block: int, iteration: int) -> tuple[Tensor, Tensor]:
    batch = draw(ids, 1, iteration, settings.batch_size)
    return batch, batch


def test_the_stochastic_sketch_finds_the_inverse_and_the_same_batch_does_not(caught: Callable) -> None:
    rich = MatrixOperator(examples(N, 3, 5) + 0.3 * torch.eye(P).double())
    mean, largest = rich.matrices.mean(0), float(torch.linalg.eigvalsh(rich.matrices.mean(0)).max())
    g = right(2)
    settings = Sketch(0.0, sketch_step(batch_scale(rich, IDS, 1)), iterations=800, batch_size=1)

    def compare() -> None:
        assert oracles.relative_error(columns(rich, g, settings, largest), torch.linalg.solve(mean, g)) < 0.15

    caught(compare, stochastic_solvers, "sketch_batches", same_batch)


def test_sgv_is_an_unbiased_estimate_of_the_inverse_times_v_with_its_standard_error(caught: Callable) -> None:
    v, flat = right(1), MatrixOperator((DEFINITE + 0.3 * torch.eye(P))[None])
    settings = Sketch(0.0, sketch_step(1.3), columns=640, width=64, iterations=300)
    truth = torch.linalg.solve(flat.matrices[0], v)

    def blocks() -> list[tuple[Tensor, Tensor]]:
        gs = [sketch_matrix({"a": 3, "b": P - 3}, settings, block) for block in range(len(settings.blocks))]
        return [(columns(flat, g, settings, 1.3, block), g) for block, g in enumerate(gs)]

    def compare() -> None:
        found = sketch_solution(flat, v, settings, blocks(), 1.3)
        assert found.standard_error is not None
        assert 0.6 < float(((found.x - truth) / found.standard_error).square().mean().sqrt()) < 1.6
        left = flat.matrices[0] @ (v - flat.matrices[0] @ found.x)
        assert torch.allclose(found.residual, left.norm(dim=0) / (flat.matrices[0] @ v).norm(dim=0))

    caught(compare, stochastic_solvers, "applied", lambda operator, block, ids: 1.2 * operator.apply(block, ids))
    one_by_one = torch.stack([sketched(v, [(s, g)])[0] for s, g in blocks()])  # ten estimates from 64 columns each
    assert torch.allclose(10 * one_by_one.mean(0), sketched(v, blocks())[0])
    spread = one_by_one.std(0) * 10**0.5
    assert 0.8 < float(spread.norm() / sketched(v, blocks())[1].norm()) < 1.25


def test_the_sketch_matrix_is_isotropic_and_no_block_sees_anothers_batches() -> None:
    settings = Sketch(0.0, 0.1, columns=4000, width=1500)
    whole = torch.cat([sketch_matrix({"a": 3, "b": 2}, settings, block) for block in range(3)], 1)
    assert whole.shape == (5, 4000)
    assert torch.allclose(whole @ whole.T, torch.eye(5).double(), atol=5 * (2 / 4000) ** 0.5)
    turned = torch.cat([sketch_matrix({"b": 2, "a": 3}, settings, block) for block in range(3)], 1)
    assert torch.equal(turned[[2, 3, 4, 0, 1]], whole), "a weight's rows follow from its name"
    drawn = [torch.stack(stochastic_solvers.sketch_batches(IDS, settings, block, 1)) for block in (0, 1)]
    assert not torch.equal(*drawn)


def test_a_step_too_long_is_stopped() -> None:
    with pytest.raises(FloatingPointError, match="the sketch diverges"):
        columns(one(DEFINITE), right(), Sketch(0.0, 1.2, iterations=500), 1.0)
    with pytest.raises(ValueError, match="from 0 training examples"):
        draw(IDS[:0], 0, 0, 1)


def test_non_finite_products_are_stopped() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        repeat(one(DEFINITE * torch.nan), right(), Lissa(0.1, 1.0), 1.0)
