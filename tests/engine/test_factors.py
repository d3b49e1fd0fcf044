import pytest
import torch

from engine import factors
from engine.factors import Factor, gradient_vector, gram, squared_norm

B, T, O, I = 3, 4, 5, 6  # noqa: E741  the field's letters


def dense(width: int, tokens: int = T, seed: int = 0) -> Factor:
    return Factor(torch.randn(B, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def hot(width: int, tokens: int = T) -> Factor:
    return Factor(torch.randint(0, width, (B, tokens), generator=torch.Generator().manual_seed(9)), width)


def as_dense(factor: Factor) -> torch.Tensor:
    if not factor.one_hot:
        return factor.values
    return torch.nn.functional.one_hot(factor.values, factor.one_hot).double()


def matrix_of(a: Factor, b: Factor) -> torch.Tensor:
    """Return [B, O, I]: the sum of outer products, one token after the other."""
    left, right = as_dense(a), as_dense(b)
    return sum(left[:, t, :, None] * right[:, t, None, :] for t in range(left.shape[1]))


PAIRS = {
    "dense": (dense(O), dense(I, seed=1)),
    "one-hot input": (dense(O), hot(I)),
    "one-hot output": (hot(O), dense(I)),
    "one token": (dense(O, 1), dense(I, 1, seed=1)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_gradient_vector_is_the_sum_of_outer_products(pair):
    a, b = PAIRS[pair]
    assert torch.allclose(gradient_vector(a, b), matrix_of(a, b).flatten(1), atol=1e-13)


@pytest.mark.parametrize("left", [dense(O), hot(O)])
@pytest.mark.parametrize("right", [dense(O, 7, seed=3), hot(O, 7)])
def test_gram_is_every_dot_product(left, right):
    truth = torch.einsum("btn,bsn->bts", as_dense(left), as_dense(right))
    assert torch.allclose(gram(left, right).double(), truth, atol=1e-13)


@pytest.mark.parametrize("pair", PAIRS)
def test_ghost_norm_equals_the_materialised_norm(pair, monkeypatch):
    a, b = PAIRS[pair]
    truth = matrix_of(a, b).square().sum((1, 2))
    for cheaper in (True, False):
        if cheaper and (a.one_hot or b.one_hot):
            continue
        monkeypatch.setattr(factors, "_cheaper_materialised", lambda *_, answer=cheaper: answer)
        assert torch.allclose(squared_norm([(a, b)]), truth, rtol=1e-12)


def test_one_token_reduces_to_the_rank_one_identity():
    a, b = PAIRS["one token"]
    assert torch.allclose(
        squared_norm([(a, b)]), a.values.square().sum((1, 2)) * b.values.square().sum((1, 2)), rtol=1e-13
    )


def test_materialised_norms_do_not_depend_on_the_window(monkeypatch):
    a, b = PAIRS["dense"]
    whole = factors._materialised_norm(a, b)
    monkeypatch.setattr(factors, "_MATERIALISED", O * I)
    assert torch.equal(factors._materialised_norm(a, b), whole)


def test_norms_of_several_calls_hold_their_cross_terms(caught):
    calls = [(dense(O), dense(I, seed=1)), (hot(O, 7), dense(I, 7, seed=2)), (dense(O, 2, seed=5), hot(I, 2))]

    def compare() -> None:
        truth = sum(matrix_of(a, b) for a, b in calls).square().sum((1, 2))
        assert torch.allclose(factors.squared_norm(calls), truth, rtol=1e-12)

    whole = factors.squared_norm
    caught(compare, factors, "squared_norm", lambda pairs: sum(whole([pair]) for pair in pairs))


@pytest.mark.parametrize("side", [dense, hot])
def test_calls_of_one_kind_are_one_call_with_the_tokens_of_all(side, caught):
    """Many tokens: the gradients are made whole, and their sum is squared."""
    calls = [(side(O, 9), dense(I, 9, seed=1)), (side(O, 7), dense(I, 7, seed=2)), (side(O, 8), dense(I, 8, seed=3))]

    def compare() -> None:
        truth = sum(matrix_of(a, b) for a, b in calls).square().sum((1, 2))
        assert torch.allclose(factors.squared_norm(calls), truth, rtol=1e-12)

    caught(compare, factors, "side_by_side", lambda parts: parts[0])


@pytest.mark.parametrize("factor", [dense(O), hot(O)])
def test_projecting_a_factor_is_a_matrix_product(factor):
    matrix = torch.randn(3, O, dtype=torch.float64)
    assert torch.allclose(factor.project(matrix), as_dense(factor) @ matrix.T, atol=1e-13)
    assert torch.equal(factor.project(None).double(), as_dense(factor))
    assert factor.width == O
