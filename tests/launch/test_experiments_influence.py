"""What the influence experiments train and compare: retraining against a fit without the row, curvature against autograd."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.solvers import finish
from engine.stochastic_solvers import Sketch, sketch_batches, sketch_columns
from launch.experiments import heads, influence_loo, influence_scaling, influence_sketch, influence_solvers
from launch.experiments.heads import Head
from launch.experiments.subjects import Part, loss
from tests import oracles
from tests.conftest import Caught
from tests.oracles import MatrixOperator, relative_error

N, WIDTH, L2 = 40, 3, 0.05


def part(count: int, seed: int) -> Part:
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Part(x, (x[:, 0] + 0.5 * torch.sin(5 * x[:, 1]) > 0).long())


@pytest.fixture(scope="module")
def head() -> Head:
    train = part(N, 1)
    return Head(train, part(5, 2), heads.as_model(heads.fit(train, L2)), L2)


def without(whole: Part, row: int) -> Part:
    return whole.take(torch.tensor([i for i in range(len(whole.labels)) if i != row]))


def test_the_fit_is_a_minimum(head: Head) -> None:
    rows = heads.gradients(head, head.train)
    weights = torch.cat([weight.flatten() for weight in head.model.parameters()])
    assert float((rows.mean(0) + L2 * weights).abs().max()) < 1e-12
    with pytest.raises(FloatingPointError, match="did not converge"):
        heads.newton(head.train, L2, torch.full((2, 4), 1e3, dtype=torch.float64), torch.ones(1, N).double(), 0.0)


def test_retraining_equals_a_fit_of_the_others_with_the_same_n_l2(head: Head) -> None:
    weights = heads.as_weights(head.model)
    found = heads.retrained_without(head.train, L2, weights, [3, 17, 5], at_once=2)
    for row, own in zip((3, 17, 5), found, strict=True):
        truth = heads.fit(without(head.train, row), L2 * N / (N - 1))
        assert relative_error(own, truth) < 1e-9
        assert relative_error(own, heads.fit(without(head.train, row), L2)) > 1e-6, "the regulariser's share stays"


def test_both_curvatures_are_that_of_autograd_with_the_l2_term(head: Head) -> None:
    names = [name for name, _ in head.model.named_parameters()]
    matrix = oracles.hessian(head.model, loss, head.train.batch(torch.arange(N)), names) / N
    truth = matrix + L2 * torch.eye(len(matrix)).double()
    for operator in (heads.operator(head), heads.operator(head, "hessian"), heads.LogisticOperator(head)):
        assert relative_error(heads.whole_matrix(operator), truth) < 1e-10
    block, ids = torch.randn(len(matrix), 2).double(), torch.tensor([4, 4, 9])
    one = heads.operator(head).apply(block, ids)
    assert relative_error(heads.LogisticOperator(head).apply(block, ids), one) < 1e-10


def test_leverage_turns_influence_into_one_newton_step(head: Head, caught: Caught) -> None:
    matrix = heads.whole_matrix(heads.operator(head))
    rows = heads.gradients(head, head.train)
    names = [name for name, _ in head.model.named_parameters()]

    def compare() -> None:
        longer = 1 / (1 - heads.leverage(head, matrix))
        for i in (0, 11):
            own = oracles.hessian(head.model, loss, head.train.batch(torch.tensor([i])), names)
            step = torch.linalg.solve(N * matrix - own, rows[i])
            assert relative_error(longer[i] * torch.linalg.solve(N * matrix, rows[i]), step) < 1e-9

    caught(compare, heads, "leverage", lambda head, matrix: 1.1 * LEVERAGE(head, matrix))


LEVERAGE = heads.leverage


def agreement(head: Head) -> dict[str, list[float]]:
    asked = head.queries
    predicted = influence_loo.scores(head, heads.gradients(head, asked))
    longer = 1 / (1 - heads.leverage(head, heads.whole_matrix(heads.operator(head))))
    weights = heads.as_weights(head.model)
    again = heads.retrained_without(head.train, head.l2, weights, list(range(N)))
    true = heads.losses_of(asked, again) - heads.losses_of(asked, weights[None])
    return influence_loo.agreement(longer[:, None] * predicted, true)


def test_influence_predicts_retraining_and_its_mutants_do_not(head: Head, caught: Caught) -> None:
    def compare() -> None:
        found = agreement(head)
        assert min(found["pearson"]) > 0.97
        assert abs(np.mean(found["slope"]) - 1) < 0.1

    caught(compare, influence_loo, "per_example_loo", lambda products, count: -products / count)
    caught(compare, influence_loo, "per_example_loo", lambda products, count: products)
    plain = influence_loo.operator
    caught(compare, influence_loo, "operator", lambda head: plain(replace(head, l2=20 * head.l2)))


def test_examples_left_out_are_the_strongest_and_others(head: Head) -> None:
    predicted = torch.arange(12.0)[:, None] * torch.tensor([[1.0, -1.0]])
    chosen = influence_loo.chosen_examples(predicted, 3, 4, seed=0).tolist()
    assert chosen[:3] == [11, 10, 9]
    assert len(set(chosen)) == 7
    assert max(chosen[3:]) < 9


def test_a_solver_is_held_against_its_own_filter(head: Head) -> None:
    asked, rows = heads.gradients(head, head.queries), heads.gradients(head, head.train)
    mu, vectors = torch.linalg.eigh(heads.whole_matrix(heads.operator(head)))
    for solver in ("cg", "squared-cg"):
        inverse = influence_solvers.Influence(solver=solver, dtype="float64").inverse
        good = influence_solvers.compare(head, inverse, rows, asked, mu, vectors)
        assert min(good["spearman"]) > 0.999
        assert good["error"] < 1e-4
        wrong = influence_solvers.compare(head, inverse, rows, asked, mu.flip(0), vectors)
        assert wrong["error"] > 0.1


def test_one_batch_for_both_is_what_the_wrapper_makes_of_two() -> None:
    matrices = torch.stack([torch.diag(torch.rand(4).double()) for _ in range(6)])
    plain, g, ids = MatrixOperator(matrices), torch.eye(4).double(), torch.arange(6)
    settings = Sketch(0.0, 0.3, columns=4, width=4, iterations=5, batch_size=1)
    found = finish(sketch_columns(influence_sketch.SameBatch(plain), g, ids, settings, 0, 1.0))
    s, later = torch.zeros_like(g), list[Tensor]()
    for t in range(1, 6):
        own = matrices[sketch_batches(ids, settings, 0, t)[1]].mean(0)
        s = s - 2 * settings.step * own @ (own @ s - g)
        later += [s] if t > 2 else []
    assert torch.allclose(found, torch.stack(later).mean(0))


def test_scaling_is_the_ratio_of_two_speed_ups() -> None:
    seconds = {
        "one actor": [8.0, 6.0],
        "two actors": [4.0, 4.0],
        "one process": [6.0, 6.0],
        "two processes": [3.0, 3.0],
    }
    done = {kind: {"seconds": seconds} for kind in influence_scaling.KINDS} | {"bits": {"lissa": ["a", "a", "a"]}}
    found = {gate.name: gate for gate in influence_scaling.gates({}, done)}
    assert found["curvature products: scaling of actors / of processes"].value == (1.0 + 0.75) / 2
    assert found["curvature products: two actors / one"].value == 1.75
    assert found["same bits on 1, 2 and 3 actors"].record()["pass"] is True
    other = done | {"bits": {"lissa": ["a", "b", "a"]}}
    assert influence_scaling.gates({}, other)[-1].record()["pass"] is False
