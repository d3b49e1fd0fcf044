"""Unbiased against the UNPROJECTED dot product, and as variable as the formulas say."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import projection
from engine.counters import derive_key
from engine.parameters import Parameter, Use
from engine.projection import (
    MAX_DENSE,
    Projection,
    dense_matrix,
    matrix,
    row_layout,
    side_matrix,
    unprojected_layout,
)
from tests import oracles
from tests.conftest import tiny_gpt2

SEEDS = 3000
KEY = derive_key(0, "classifier.weight", "input")


def parameter(out_features: int, in_features: int, name: str = "w") -> Parameter:
    return Parameter(name, out_features, in_features, (Use("m", "linear" if in_features else "bias"),))


def stack(kind: str, rows: int, width: int, name: str) -> Tensor:
    """Return SEEDS independent (rows, width) matrices, drawn as one wide one."""
    wide = matrix(kind, derive_key(1, name), rows, SEEDS * width).double()
    return wide.reshape(rows, SEEDS, width).transpose(0, 1)


def two_sided_dots(k: int, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> np.ndarray:
    """Return the dot products of the projected rank-one gradients δxᵀ under SEEDS projections."""
    dots = torch.ones(SEEDS, dtype=torch.float64)
    for side, left, right in zip(("output", "input"), a, b, strict=True):
        drawn = stack("gaussian", k, len(left), side)
        dots *= ((drawn @ left) * (drawn @ right)).sum(1)
    return dots.numpy()


def dense_dots(kind: str, d: int, a: Tensor, b: Tensor) -> np.ndarray:
    drawn = stack(kind, d, len(a), "dense")
    return ((drawn @ a) * (drawn @ b)).sum(1).numpy()


def vectors(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two vectors at an angle that is neither right nor straight."""
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, width, generator=generator, dtype=torch.float64)
    return a, 0.7 * a + 0.5 * noise


def assert_unbiased(dots: np.ndarray, truth: float) -> None:
    assert abs(dots.mean() - truth) < 3 * dots.std(ddof=1) / np.sqrt(len(dots))


def assert_variance(dots: np.ndarray, truth: float, variance: float) -> None:
    assert 0.8 < ((dots - truth) ** 2).mean() / variance < 1.2


@pytest.mark.parametrize("k", [8, 16, 32])
@pytest.mark.parametrize("same", [True, False])
def test_two_sided_error_follows_t15a(k, same):
    (left, other), (right, another) = vectors(k + 5, 1), vectors(k + 9, 2)
    a, b = (left, right), (left, right) if same else (other, another)
    truth = float((a[0] @ b[0]) * (a[1] @ b[1]))
    dots = two_sided_dots(k, a, b)
    assert_unbiased(dots, truth)
    assert_variance(dots, truth, oracles.two_sided_projection_variance(a, b, k))
    if same:
        assert oracles.two_sided_projection_variance(a, b, k) == pytest.approx(truth**2 * ((1 + 2 / k) ** 2 - 1))


@pytest.mark.parametrize("root", [8, 16, 32])
@pytest.mark.parametrize(
    ("kind", "formula"),
    [("gaussian", oracles.dense_projection_variance), ("rademacher", oracles.sign_projection_variance)],
)
def test_dense_error_follows_t13(root, kind, formula):
    a, b = vectors(3, 3)
    dots = dense_dots(kind, root * root, a, b)
    assert_unbiased(dots, float(a @ b))
    assert_variance(dots, float(a @ b), formula(a, b, root * root))


SHAPES = [(3, 40), (40, 3), (24, 24), (3, 3), (40, 0), (5, 0)]  # sides kept, sides projected, vectors


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sided_is_unbiased_whatever_the_shape_of_the_module(shape):
    """Each seed's own matrices, as a worker draws them, against the dot product of the whole gradients."""
    out_features, in_features = shape
    a, b = (v.reshape(out_features, -1) for v in vectors(out_features * max(1, in_features), 5))
    dots = np.empty(2000)
    for seed in range(2000):
        kept = Projection("two-sided", 8, seed)
        left = side_matrix(kept, "w", "output", out_features)
        right = side_matrix(kept, "w", "input", in_features) if in_features else None
        pa, pb = a, b
        if left is not None:
            pa, pb = left.double() @ pa, left.double() @ pb
        if right is not None:
            pa, pb = pa @ right.double().T, pb @ right.double().T
        dots[seed] = (pa * pb).sum()
    truth = float((a * b).sum())
    if min(out_features, 8) == out_features and (not in_features or in_features <= 8):
        assert np.allclose(dots, truth)
    else:
        assert_unbiased(dots, truth)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (7, 0)])
def test_dense_is_unbiased_whatever_the_shape_of_the_module(kind, shape):
    here = parameter(*shape)
    a, b = vectors(here.size, 6)
    dots = np.empty(2000)
    for seed in range(2000):
        drawn = dense_matrix(Projection(kind, 16, seed), here).double()
        dots[seed] = (drawn @ a) @ (drawn @ b)
    assert_unbiased(dots, float(a @ b))


def test_variance_one_over_the_input_and_dependent_sides_are_caught(caught):
    """Against the whole gradients: both sides of a comparison under one wrong matrix would agree."""
    left = vectors(20, 1)[0]

    def compare() -> None:
        dots = np.empty(600)
        for seed in range(600):
            sides = [projection.side_matrix(Projection("two-sided", 8, seed), "w", s, 20) for s in ("output", "input")]
            dots[seed] = np.prod([float((side.double() @ left).square().sum()) for side in sides])
        assert_unbiased(dots, float(left @ left) ** 2)

    drawn = projection.matrix
    caught(
        compare,
        projection,
        "matrix",
        lambda kind, key, rows, columns: drawn(kind, key, rows, columns) * (rows / columns) ** 0.5,
    )
    caught(compare, projection, "derive_key", lambda seed, parameter, side: derive_key(seed, parameter))


def test_kinds_have_the_entries_they_promise():
    gaussian, sign = matrix("gaussian", KEY, 16, 2000), matrix("rademacher", KEY, 16, 2000)
    assert torch.equal(sign.abs(), torch.full_like(sign, 0.25))
    assert abs(float(gaussian.var()) * 16 - 1) < 4 * np.sqrt(2 / gaussian.numel())


def test_golden_matrices():
    assert matrix("gaussian", KEY, 2, 2).tolist() == [
        [0.3004562258720398, 0.048685405403375626],
        [0.027387604117393494, 1.019492506980896],
    ]
    assert (matrix("rademacher", KEY, 2, 3) * 2**0.5).round().tolist() == [[-1, -1, -1], [-1, 1, -1]]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_a_block_of_columns_is_drawn_without_the_rest(kind):
    whole = matrix(kind, KEY, 5, 30)
    assert torch.equal(matrix(kind, KEY, 5, 30, first=7, count=4), whole[:, 7:11])
    far = matrix(kind, KEY, 5, 2**40 + 3, first=2**40, count=3)
    assert torch.equal(far[:, 1:2], matrix(kind, KEY, 5, 2**40 + 3, first=2**40 + 1, count=1))


def test_seed_parameter_and_side_each_change_the_matrix():
    base = side_matrix(Projection(seed=1), "w", "output", 20)
    for seed, name, side in ((2, "w", "output"), (1, "v", "output"), (1, "w", "input")):
        assert not torch.equal(base, side_matrix(Projection(seed=seed), name, side, 20))
    torch.manual_seed(5)
    assert torch.equal(base, side_matrix(Projection(seed=1), "w", "output", 20))


def test_a_side_no_wider_than_k_stays():
    assert side_matrix(Projection(dim=16), "w", "output", 16) is None
    assert side_matrix(Projection(dim=16), "w", "output", 17).shape == (16, 17)


def test_two_sided_layout_puts_matrices_on_chunk_boundaries_and_vectors_together():
    parameters = [parameter(40, 3, "a"), parameter(40, 0, "a.bias"), parameter(20, 30, "b"), parameter(4, 0, "b.bias")]
    layout = row_layout(parameters, Projection(dim=16))
    assert {r.parameter: (r.start, r.stop) for r in layout.ranges} == {
        "a": (0, 48), "b": (256, 512), "a.bias": (512, 528), "b.bias": (528, 532),
    }  # fmt: skip
    assert layout.arrays == {"rows": 532}
    assert layout.of("b").rows == layout.of("b").columns == 16


def test_unprojected_layout_has_an_array_a_parameter():
    layout = row_layout([parameter(4, 3, "a"), parameter(4, 0, "b")], Projection("none"))
    assert layout.arrays == {"a": 12, "b": 4}


def test_too_wide_unprojected_is_refused_for_a_store_only():
    wide = [parameter(1024, 65, "head")]
    with pytest.raises(ValueError, match="projection=none is not allowed for head: 66560"):
        row_layout(wide, Projection("none"))
    assert unprojected_layout(wide).arrays == {"head": 66560}


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_too_large_dense_is_refused_before_anything_is_drawn(kind):
    limit = MAX_DENSE // 1024
    assert row_layout([parameter(limit, 0)], Projection(kind, 1024)).arrays == {"rows": 1024}
    with pytest.raises(ValueError, match=r"at most 2\^31"):
        row_layout([parameter(limit, 0), parameter(1, 0, "one")], Projection(kind, 1024))


def test_every_parameter_of_a_model_has_its_own_columns():
    from engine.parameters import supported_parameters

    parameters, _ = supported_parameters(tiny_gpt2())
    layout = row_layout(parameters, Projection(dim=4))
    taken = np.zeros(layout.arrays["rows"], dtype=int)
    for r in layout.ranges:
        taken[r.start : r.stop] += 1
        assert r.stop - r.start == r.rows * r.columns
    assert taken.max() == 1
    assert len(layout.ranges) == len(parameters)
