"""Multi-stage influence against finite differences of both stages trained again, on closed forms and on small networks."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine import multistage
from engine.batches import Batch
from engine.coordinates import chosen_coordinates, flat_coordinates
from engine.curvature import Curvature, Examples, LocalOperator
from engine.multistage import Shared, early_stopping, fixed, placed, proximal, shared_places, updated
from engine.solvers import conjugate_gradient, exact, finish, squared_gradient
from tests.oracles import MatrixOperator, relative_error

W, U, T, M = 4, 3, 5, 12  # numbers in W, U and Θ; pretraining examples
CASES = {"fixed": 0.0, "updated": 0.01, "updated, strongly held": 1.0}


def definite(size: int, generator: torch.Generator) -> Tensor:
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return a @ a.T / size + 0.5 * torch.eye(size)


class Quadratics:
    """g(z), F and f are quadratic, so both stages have closed forms. Order: (U, W) in pretraining, (W, Θ) after it."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.a = torch.stack([definite(U + W, draw) for _ in range(M)])  # ½ sᵀ a s − bᵀ s of every z
        self.b = torch.randn(M, U + W, generator=draw, dtype=torch.float64)
        self.k, self.q = definite(W + T, draw), definite(W + T, draw)  # of F and f
        self.c, self.d = torch.randn(2, W + T, generator=draw, dtype=torch.float64)
        self.shared = Shared(torch.arange(U, U + W), torch.arange(W), torch.arange(W, W + T), U + W, W + T)

    def pretrained(self, z: int = 0, epsilon: float = 0.0) -> Tensor:
        return torch.linalg.solve(self.a.mean(0) + epsilon * self.a[z], self.b.mean(0) + epsilon * self.b[z])

    def finetuned(self, w: Tensor, alpha: float) -> Tensor:
        """Return (W, Θ); alpha 0: W stays."""
        if not alpha:
            theta = torch.linalg.solve(self.k[W:, W:], self.c[W:] - self.k[W:, :W] @ w)
            return torch.cat([w, theta])
        right = self.c.clone()
        right[:W] += 2 * alpha * w
        held = torch.diag(torch.cat([torch.full((W,), 2 * alpha), torch.zeros(T)]).double())
        return torch.linalg.solve(self.k + held, right)

    def answer(self, z: int, epsilon: float, alpha: float) -> float:
        x = self.finetuned(self.pretrained(z, epsilon)[U:], alpha)
        return float(0.5 * x @ self.q @ x - self.d @ x)

    def truth(self, alpha: float, epsilon: float = 1e-5) -> Tensor:
        both = [[self.answer(z, sign * epsilon, alpha) for z in range(M)] for sign in (1, -1)]
        up, down = torch.tensor(both, dtype=torch.float64)
        return (up - down) / (2 * epsilon)

    def influence(self, alpha: float, **mutated: Callable) -> Tensor:
        """Return I(z, q) for every z, [m]; `mutated` replaces a piece."""
        s = self.pretrained()
        at = self.finetuned(s[U:], alpha)
        f = mutated.get("point", lambda at, w: self.q @ at - self.d)(at, s[U:])[:, None]
        pretraining = mutated.get("pretraining", lambda r: torch.linalg.solve(self.a.mean(0), r))
        if not alpha:
            own = self.k[W:, W:]
            parts = fixed(
                f, lambda b: torch.linalg.solve(own, b), MatrixOperator(self.k[None]), pretraining, self.shared
            )
        else:
            held = proximal(0.0, alpha, self.shared)
            inverse = mutated.get("finetuning", lambda b: torch.linalg.solve(self.k + torch.diag(held[:, 0]), b))
            parts = updated(f, inverse, pretraining, self.shared, mutated.get("factor", lambda a: a)(alpha))
        g = torch.einsum("mij,j->mi", self.a, s) - self.b
        return g @ parts.whole[:, 0]


@pytest.fixture(scope="module")
def toy() -> Quadratics:
    return Quadratics()


@pytest.mark.parametrize("alpha", CASES.values(), ids=CASES)
def test_influence_is_the_slope_of_both_stages_trained_again(toy: Quadratics, alpha: float) -> None:
    assert relative_error(toy.influence(alpha), toy.truth(alpha)) < 1e-6


def test_a_w_that_is_held_fast_is_case_1_and_one_let_go_has_no_influence(toy: Quadratics) -> None:
    assert relative_error(toy.influence(1e8), toy.influence(0.0)) < 1e-6
    assert float(toy.influence(1e-9).norm()) < 1e-6


def test_without_theta_it_is_the_influence_of_one_stage(toy: Quadratics) -> None:
    s, empty = toy.pretrained(), torch.empty(0, dtype=torch.int64)
    alone = Shared(torch.arange(U, U + W), torch.arange(W), empty, U + W, W)
    f = (toy.q[:W, :W] @ s[U:] - toy.d[:W])[:, None]
    parts = fixed(f, lambda b: b, MatrixOperator(toy.k[None, :W, :W]), toy_inverse(toy), alone)
    g = torch.einsum("mij,j->mi", toy.a, s) - toy.b
    one_stage = -g @ torch.linalg.solve(toy.a.mean(0), torch.cat([torch.zeros(U, 1).double(), f]))
    assert relative_error(g @ parts.whole, one_stage) < 1e-12
    assert not parts.through_own.any()


def toy_inverse(toy: Quadratics) -> Callable[[Tensor], Tensor]:
    return lambda r: torch.linalg.solve(toy.a.mean(0), r)


def w_block_only(toy: Quadratics) -> Callable:
    return lambda r: torch.cat([torch.zeros(U, r.shape[1]).double(), torch.linalg.solve(toy.a.mean(0)[U:, U:], r[U:])])


def u_dropped(toy: Quadratics) -> Callable:
    return lambda r: torch.cat([torch.zeros(U, r.shape[1]).double(), toy_inverse(toy)(r)[U:]])


MUTANTS: dict[str, tuple[tuple[str, ...], str, Callable[[Quadratics], Callable]]] = {
    "W block only": (tuple(CASES), "pretraining", w_block_only),
    "U dropped": (tuple(CASES), "pretraining", u_dropped),
    "α for 2α": (("updated", "updated, strongly held"), "factor", lambda toy: lambda alpha: alpha / 2),
    "2α left out of K": (("updated", "updated, strongly held"), "finetuning",
                         lambda toy: lambda b: torch.linalg.solve(toy.k, b)),
    "W̄ for W*": (("updated", "updated, strongly held"), "point",
                  lambda toy: lambda at, w: toy.q @ torch.cat([w, at[W:]]) - toy.d),
    "sign": (tuple(CASES), "pretraining", lambda toy: lambda r: -toy_inverse(toy)(r)),
}  # fmt: skip


@pytest.mark.parametrize(("mutant", "case"), [(name, case) for name, (cases, *_) in MUTANTS.items() for case in cases])
def test_a_mutant_is_not_the_slope(toy: Quadratics, mutant: str, case: str) -> None:
    _, piece, wrong = MUTANTS[mutant]
    assert relative_error(toy.influence(CASES[case], **{piece: wrong(toy)}), toy.truth(CASES[case])) > 1e-4


def test_the_proximal_diagonal_has_2_alpha_at_w_and_l2_everywhere(toy: Quadratics) -> None:
    assert proximal(0.1, 0.01, toy.shared)[:, 0].tolist() == pytest.approx([0.12] * W + [0.1] * T)
    assert early_stopping(0.5, 100) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="T ≥ 1, here η = 0.5, T = 0"):
        early_stopping(0.5, 0)


class Chain(nn.Module):
    """An embedding W and a head."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 2), nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


NAMES = {"embed.weight": "embed.weight", "embed.bias": "embed.bias"}
L2 = 0.05


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@dataclass
class Stage:
    """A small network with its examples, trained on all of them to the last digits."""

    model: nn.Module
    batch: Batch

    def __post_init__(self) -> None:
        self.space = chosen_coordinates(self.model, ["*"])
        self.x = self.space.flat([w.detach() for w in self.model.parameters()])

    def losses(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        named = {w.name: t for w, t in zip(self.space.weights, self.space.tensors(x), strict=True)}
        batch = batch or self.batch
        out = functional_call(self.model, named, (batch["x"],))
        return nn.functional.cross_entropy(out, batch["y"], reduction="none")

    def train(self, weights: Tensor, extra: Callable[[Tensor], Tensor], free: Tensor) -> Tensor:
        """Return where Σ weights · ℓ + ½ L2 ‖·‖² + extra has no slope in the free places."""

        def objective(x: Tensor) -> Tensor:
            return (weights * self.losses(x)).sum() + 0.5 * L2 * x.square().sum() + extra(x)

        x = self.x.clone().requires_grad_()
        rough = torch.optim.LBFGS([x], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            value = objective(x)
            x.grad = torch.autograd.grad(value, x)[0] * torch.zeros_like(x).index_fill_(0, free, 1.0)
            return value

        rough.step(closure)
        x = x.detach()
        for _ in range(6):
            slope = torch.autograd.functional.jacobian(objective, x)[free]
            if float(slope.norm()) < 1e-13:
                break
            x[free] -= torch.linalg.solve(torch.autograd.functional.hessian(objective, x)[free][:, free], slope)
        return x

    def operator(self, x: Tensor, names: list[str], l2: float | Tensor = L2) -> LocalOperator:
        for weight, tensor in zip(self.model.parameters(), self.space.tensors(x), strict=True):
            weight.data = tensor.clone()
        space = chosen_coordinates(self.model, names)
        curvature = Curvature(self.model, loss, space, "hessian", torch.float64)
        return LocalOperator(curvature, Examples(self.batch.ids, [[self.batch]], lambda ids: []), l2)


def stage(outputs: int, count: int, seed: int) -> Stage:
    torch.manual_seed(seed)
    model = Chain(outputs).double()
    labels = torch.randint(0, outputs, (count,))
    return Stage(model, Batch(torch.arange(count), {"x": torch.randn(count, 3).double(), "y": labels}))


@pytest.mark.parametrize(("alpha", "solver"), [(0.0, squared_gradient), (0.02, conjugate_gradient)])
def test_small_networks_with_operators_and_solvers(alpha: float, solver: Callable) -> None:
    pre, fine = stage(2, 8, 0), stage(3, 6, 1)
    shared = shared_places(pre.space, fine.space, NAMES)
    query = stage(3, 2, 2).batch
    even, z = torch.full((8,), 1 / 8, dtype=torch.float64), 3

    def trained(epsilon: float) -> tuple[Tensor, Tensor]:
        first = pre.train(even + epsilon * (torch.arange(8) == z), lambda x: x.sum() * 0, torch.arange(pre.space.size))
        start = fine.x.clone()
        start[shared.finetuning] = first[shared.pretraining]
        fine.x = start
        free = torch.arange(fine.space.size) if alpha else shared.own
        held = start[shared.finetuning]
        return first, fine.train(
            torch.full((6,), 1 / 6).double(),
            lambda x: alpha * (x[shared.finetuning] - held).square().sum(), free,
        )  # fmt: skip

    first, second = trained(0.0)
    f = torch.autograd.functional.jacobian(lambda x: fine.losses(x, query), second).T.contiguous()
    g = torch.autograd.functional.jacobian(pre.losses, first)[z]

    def inverse(operator: LocalOperator) -> Callable[[Tensor], Tensor]:
        return lambda b: finish(solver(operator, b, 0.0, 10.0, 1e-12, 200)).x

    pretraining = inverse(pre.operator(first, ["*"]))
    if alpha:
        held = fine.operator(second, ["*"], proximal(L2, alpha, shared))
        parts = updated(f, inverse(held), pretraining, shared, alpha)
    else:
        head, joint = fine.operator(second, ["head"]), fine.operator(second, ["*"])
        parts = fixed(f, inverse(head), joint, pretraining, shared)
    up, down = (fine.losses(trained(sign * 1e-5)[1], query) for sign in (1, -1))
    assert relative_error(g @ parts.whole, (up - down) / 2e-5) < 1e-5
    assert float(parts.through_own.norm()) > 0
    assert float(parts.through_shared.norm()) > 0


def test_the_matrix_of_case_2_is_the_same_for_the_exact_solver(toy: Quadratics) -> None:
    held = proximal(0.0, 0.01, toy.shared)
    operator = MatrixOperator((toy.k + torch.diag(held[:, 0]))[None])
    f = torch.ones(W + T, 1).double()
    one = updated(f, lambda b: finish(exact(operator, b, 0.0)).x, toy_inverse(toy), toy.shared, 0.01)
    other = updated(f, lambda b: torch.linalg.solve(operator.matrices[0], b), toy_inverse(toy), toy.shared, 0.01)
    torch.testing.assert_close(one.whole, other.whole)


def test_places_follow_the_weights_own_entries_whatever_the_layout() -> None:
    class Words(nn.Module):
        def __init__(self, late: bool) -> None:
            super().__init__()
            if late:
                self.head = nn.Linear(3, 2)
            self.words = nn.Embedding(4, 3)
            if not late:
                self.head = nn.Linear(3, 2)

    ours, theirs = (chosen_coordinates(Words(late), ["*"]) for late in (False, True))
    assert ours.weights[0].turned
    shared = shared_places(ours, theirs, {"words.weight": "words.weight"})
    flat = flat_coordinates({"words.weight": 12})
    assert not flat.weights[0].turned
    values = torch.randn(4, 3).double()
    vector = torch.zeros(ours.size, 1).double()
    vector[shared.pretraining, 0] = values.flatten()
    assert torch.equal(ours.tensors(vector[:, 0])[0], values)
    other = placed(values.reshape(-1, 1), shared.finetuning, shared.finetuning_size)
    assert torch.equal(theirs.tensors(other[:, 0])[2], values)
    assert sorted([*shared.finetuning.tolist(), *shared.own.tolist()]) == list(range(theirs.size))


@pytest.mark.parametrize(
    ("names", "said"),
    [({"lost": "w"}, "lost is no chosen weight of pretraining: one of w, u"),
     ({"w": "lost"}, "lost is no chosen weight of fine-tuning: one of w, t"),
     ({"w": "w", "u": "w"}, "w and u of pretraining both became w"),
     ({"u": "t"}, r"u is \(3,\) in pretraining and t \(5,\) in fine-tuning")],
)  # fmt: skip
def test_names_and_shapes_that_do_not_fit_are_refused(names: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        shared_places(flat_coordinates({"w": W, "u": U}), flat_coordinates({"w": W, "t": T}), names)
    assert (
        multistage.shared_places(flat_coordinates({"w": W, "u": U}), flat_coordinates({"w": W}), {"w": "w"}).own.numel()
        == 0
    )
