import pytest
import torch

from engine import projectors
from engine.factors import Factor
from engine.parameters import Parameter, Use
from engine.projection import Projection, dense_matrix, side_matrix
from engine.projectors import Dense, Sums, TwoSided, Whole, make_projector

MATRIX = Parameter("w", 9, 11, (Use("m", "linear"),))
VECTOR = Parameter("b", 9, 0, (Use("m", "bias"),))
CPU, F64 = torch.device("cpu"), torch.float64
A = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0), dtype=F64)
X = torch.randn(4, 3, 11, generator=torch.Generator().manual_seed(1), dtype=F64)
G = torch.einsum("bto,bti->boi", A, X)
V = A.sum(1)


def rows_of(projector: projectors.Projector, calls: int = 1) -> dict[str, torch.Tensor]:
    sums = Sums()
    for _ in range(calls):
        projector.add_matrix(sums, MATRIX, Factor(A), Factor(X))
        projector.add_vector(sums, VECTOR, V)
    return projector.arrays(sums, torch.empty(4, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_sided_is_the_kronecker_product(dtype):
    kept = Projection("two-sided", 4, seed=3)
    projector = TwoSided([MATRIX, VECTOR], kept, CPU, dtype)
    rows = rows_of(projector)["rows"]
    left, right = (side_matrix(kept, "w", s, n).double() for s, n in (("output", 9), ("input", 11)))
    truth = G.flatten(1) @ torch.kron(left, right).T
    here, there = projector.layout.of("w"), projector.layout.of("b")
    assert torch.allclose(rows[:, here.start : here.stop], truth, rtol=1e-12)
    bias = V @ side_matrix(kept, "b", "output", 9).double().T
    assert torch.allclose(rows[:, there.start : there.stop], bias, rtol=1e-12)


def test_two_sided_keeps_small_sides_whole():
    projector = TwoSided([MATRIX, VECTOR], Projection("two-sided", 11), CPU, F64)
    rows = rows_of(projector)["rows"]
    assert torch.allclose(rows[:, :99], G.flatten(1), rtol=1e-13)
    assert torch.equal(rows[:, 99:256], torch.zeros(4, 157, dtype=F64))
    assert torch.allclose(rows[:, 256:], V, rtol=1e-13)


def test_two_sided_leaves_zeros_for_what_is_not_there():
    later, sums = Parameter("later", 9, 11, MATRIX.uses), Sums()
    projector = TwoSided([MATRIX, later], Projection("two-sided", 4), CPU, F64)
    projector.add_matrix(sums, later, Factor(A), Factor(X))
    rows = projector.arrays(sums, V)["rows"]
    here = projector.layout.of("later")
    assert rows.shape == (4, projector.layout.arrays["rows"])
    assert torch.equal(rows[:, here.start : here.stop], sums["later"])
    assert rows.count_nonzero() == sums["later"].numel()


@pytest.mark.parametrize("dim", [4, 11, 20])
def test_two_sided_takes_one_hot_factors_on_either_side(dim):
    tokens = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(2))
    turned = Parameter("w", 11, 9, MATRIX.uses)
    for parameter, pair in (
        (MATRIX, (Factor(A), Factor(tokens, 11))),
        (turned, (Factor(tokens, 11), Factor(A))),
    ):
        dense = [Factor(torch.nn.functional.one_hot(f.values, 11).double()) if f.one_hot else f for f in pair]
        found = []
        for a, b in (pair, dense):
            projector = TwoSided([parameter], Projection("two-sided", dim), CPU, F64)
            sums = Sums()
            projector.add_matrix(sums, parameter, a, b)
            found.append(projector.arrays(sums, torch.empty(4, dtype=F64))["rows"])
        assert torch.allclose(found[0], found[1], atol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_dense_is_one_matrix_over_the_whole_gradient(kind):
    kept = Projection(kind, 6, seed=2)
    rows = rows_of(make_projector([MATRIX, VECTOR], kept, CPU, F64))["rows"]
    blocks = torch.cat([dense_matrix(kept, p).double() for p in (MATRIX, VECTOR)], 1)
    assert torch.allclose(rows, torch.cat([G.flatten(1), V], 1) @ blocks.T, rtol=1e-10, atol=1e-12)


def test_dense_with_query_gradients_is_their_dot_products():
    queries = {"w": torch.randn(2, 99, dtype=F64), "b": torch.randn(2, 9, dtype=F64)}
    rows = rows_of(Dense(queries))["rows"]
    assert torch.allclose(rows, G.flatten(1) @ queries["w"].T + V @ queries["b"].T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 3, 40])  # 40: the gradients themselves are made
@pytest.mark.parametrize("out", [9, 30])
@pytest.mark.parametrize("side", ["neither", "output", "input"])
def test_dense_takes_every_kind_of_factor(columns, out, side):
    parameter = Parameter("w", out, 11, MATRIX.uses)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, 3, width, generator=generator, dtype=F64) for width in (out, 11))
    places = torch.randint(0, 9, (4, 3), generator=generator)
    if side == "output":
        a = torch.nn.functional.one_hot(places, out).double()
    if side == "input":
        b = torch.nn.functional.one_hot(places, 11).double()
    queries = torch.randn(columns, out * 11, generator=generator, dtype=F64)
    sums, projector = Sums(), Dense({"w": queries})
    left, right = (
        Factor(places, out) if side == "output" else Factor(a),
        Factor(places, 11) if side == "input" else Factor(b),
    )
    projector.add_matrix(sums, parameter, left, right)
    expected = torch.einsum("bto,bti->boi", a, b).flatten(1) @ queries.T
    assert torch.allclose(sums["rows"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("moved", [-1, 1000])  # by way of the gradients, and without them
def test_dense_does_not_depend_on_the_window(moved, monkeypatch):
    kept = Projection("gaussian", 6)
    whole = rows_of(make_projector([MATRIX, VECTOR], kept, CPU, F64))["rows"]
    monkeypatch.setattr(projectors, "_MATERIALISED", 2 * MATRIX.size)
    monkeypatch.setattr(projectors, "_MOVED", moved)
    windowed = rows_of(make_projector([MATRIX, VECTOR], kept, CPU, F64))["rows"]
    assert torch.allclose(windowed, whole, rtol=1e-13)


def test_whole_keeps_everything():
    rows = rows_of(make_projector([MATRIX, VECTOR], Projection("none"), CPU, F64))
    assert torch.allclose(rows["w"], G.flatten(1), rtol=1e-13)
    assert torch.equal(rows["b"], V)


def test_whole_refuses_what_is_too_wide_to_store():
    wide = [Parameter("head", 1024, 65, MATRIX.uses)]
    with pytest.raises(ValueError, match="projection=none"):
        Whole(wide)
    assert Whole(wide, stored=False).layout.arrays == {"head": 66560}


@pytest.mark.parametrize(
    "make",
    [
        lambda: TwoSided([MATRIX, VECTOR], Projection("two-sided", 4), CPU, F64),
        lambda: make_projector([MATRIX, VECTOR], Projection("gaussian", 6), CPU, F64),
        lambda: Whole([MATRIX, VECTOR]),
    ],
)
def test_calls_of_a_shared_module_add_up(make):
    projector = make()
    once = rows_of(projector)
    twice = rows_of(projector, calls=2)
    assert all(torch.allclose(twice[name], 2 * once[name], rtol=1e-13) for name in once)


def test_dense_layout_says_that_it_mixes_parameters():
    projector = make_projector([MATRIX, VECTOR], Projection("gaussian", 6), CPU, F64)
    assert [(r.parameter, r.start, r.stop) for r in projector.layout.ranges] == [("*", 0, 6)]
