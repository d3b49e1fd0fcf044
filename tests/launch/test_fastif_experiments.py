"""The FastIF experiments' own arithmetic: recall, removal, steps, graph and errors, by hand and against the definitions."""

import numpy as np
import pytest
import torch

from launch.experiments import fastif_graph, fastif_head, fastif_quality, fastif_recall, fastif_removal
from launch.experiments import fastif_simulatability as simulatability
from launch.experiments.fastif_correction import descend
from launch.experiments.heads import (
    Head,
    LogisticOperator,
    as_model,
    as_weights,
    fit,
    gradients,
    losses_of,
    whole_matrix,
)
from launch.experiments.subjects import Part, loss, mlp
from tests.conftest import Caught

WIDTH, L2 = 4, 0.02


def part(count: int, seed: int) -> Part:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return Part(inputs, (inputs[:, 0] + torch.randn(count, generator=generator) > 0).long())


@pytest.fixture
def subject() -> fastif_head.ConvexSubject:
    train = part(60, 1)
    head = Head(train, part(12, 2), as_model(fit(train, L2)), L2)
    size = head.coordinates.size
    matrix = whole_matrix(LogisticOperator(head)) - L2 * torch.eye(size, dtype=torch.float64)
    return fastif_head.ConvexSubject(head, part(8, 3), matrix, gradients(head, train))


@pytest.fixture
def asked(subject: fastif_head.ConvexSubject) -> torch.Tensor:
    return fastif_head.asked_gradients(subject, subject.head.queries)


def test_influence_on_the_head_predicts_leaving_one_out(subject, asked: torch.Tensor, caught: Caught) -> None:
    removed = [torch.tensor([i]) for i in range(12)]
    truth = fastif_head.rises_without(subject, subject.head.queries, removed)
    diagonal = torch.arange(12)

    def compare() -> None:
        predicted = subject.influence(subject.solve(asked, L2))[diagonal, diagonal]
        assert torch.corrcoef(torch.stack([predicted, truth]))[0, 1] > 0.98
        assert float(predicted @ truth / (truth @ truth)) == pytest.approx(1, abs=0.2)

    caught(compare, fastif_head, "per_example_loo", lambda products, count: -products / count)


def test_fast_solution_comes_to_the_exact_one_without_the_l2_term_twice(subject, asked: torch.Tensor) -> None:
    given = {"depth": 300, "batch_size": 32, "repetitions": 16}
    damping = 0.3 * subject.largest
    found = fastif_head.fast_solution(subject, asked, damping, given, seed=0)
    exact = subject.solve(asked, damping)
    assert float((found - exact).norm() / exact.norm()) < 0.05
    assert float((subject.solve(asked, damping + L2) - exact).norm() / exact.norm()) > 0.05


def test_recall_is_the_share_of_the_strongest_among_the_nearest() -> None:
    scores = torch.tensor([[5.0], [4.0], [-9.0], [1.0]])
    near = np.array([[2, 0, 3, 1]])
    assert fastif_recall.recalls(scores.abs(), near, 2, [1, 2]) == {"1": [0.5], "2": [1.0]}
    assert fastif_recall.recalls(scores, near, 2, [2, 4]) == {"2": [0.5], "4": [1.0]}
    assert fastif_recall.recalls(-scores, near, 1, [1]) == {"1": [1.0]}


def test_only_candidates_with_the_right_sign_are_left_out() -> None:
    scores = torch.tensor([3.0, torch.nan, 1.0, -2.0, 5.0])
    assert fastif_removal.strongest(scores, 2).tolist() == [4, 0]
    assert fastif_removal.strongest(scores, 5).tolist() == [4, 0, 2]
    assert fastif_removal.strongest(-scores, 5).tolist() == [3]


def test_random_examples_have_the_label_that_was_asked_for() -> None:
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    for label in (0, 1):
        assert (labels[fastif_head.random_of_label(labels, label, 2, 0, 7)] == label).all()


def test_a_step_changes_the_loss_by_the_gradients_product_to_first_order(subject, asked: torch.Tensor) -> None:
    rate = 1e-5
    ids = torch.arange(20).expand(12, -1)
    changes = simulatability.steps(subject.head, subject.head.train, subject.head.queries, ids, torch.tensor([rate]))
    slopes = (subject.own[:20] @ asked).T
    torch.testing.assert_close(changes[:, :, 0].double() / rate, -slopes, rtol=1e-2, atol=1e-4)


def test_the_simulator_learns_the_task_models_answers(subject) -> None:
    simulator = simulatability.simulator_of(subject.head)
    assert (simulator.train.labels == simulatability.predicted(subject.head, subject.head.train)).all()
    right = losses_of(simulator.train, as_weights(simulator.model)[None]).mean()
    assert right < losses_of(simulator.train, as_weights(subject.head.model)[None]).mean()


def test_errors_are_of_the_mean_of_groups_of_repetitions() -> None:
    exact = torch.tensor([[1.0], [0.0]])
    runs = torch.tensor([[[1.5], [0.0]], [[0.5], [0.0]], [[1.0], [1.0]], [[1.0], [-1.0]]])
    assert fastif_quality.errors(runs, exact, 1).tolist() == [0.75]
    assert fastif_quality.errors(runs, exact, 2).tolist() == [0.0]


DONE = {
    "a": {"queries": [3, 4], "edges": [[[0, 1.0], [1, -2.0]], [[0, 3.0], [2, 4.0]]]},
    "b": {"queries": [5], "edges": [[[0, -1.0], [1, 2.0], [2, -3.0]]]},
}


def test_slices_count_their_edges_and_agree_over_shared_examples() -> None:
    found = fastif_graph.statistics(DONE)
    assert fastif_graph.mean_influence(DONE["a"]) == {0: 2.0, 1: -2.0, 2: 4.0}
    assert found["slices"]["a"] | {"mean_helpful": 0} == {
        "queries": 2, "edges": 4, "helpful": 3, "harmful": 1, "mean_helpful": 0, "mean_harmful": 2.0, "examples": 3,
    }  # fmt: skip
    assert found["pairs"]["a | b"]["examples"] == 3
    assert found["pairs"]["a | b"]["correlation"] == pytest.approx(np.corrcoef([2, -2, 4], [-1, 2, -3])[0, 1])
    lost = {"a": DONE["a"], "b": {"queries": [5], "edges": [[[0, -1.0]]]}}
    for done, passes in ((DONE | {"b": {"queries": [5], "edges": [[[0, 1.0], [1, 1.0]]]}}, True), (lost, False)):
        assert fastif_graph.gates({"neighbours": 2}, done)[0].record()["pass"] is passes


def test_mistakes_stand_on_the_circle_and_examples_towards_what_they_influence() -> None:
    outer, inner = fastif_graph.places(DONE)
    assert np.linalg.norm(np.concatenate(list(outer.values())), axis=1) == pytest.approx([1, 1, 1])
    weights, own = np.array([4.0, 3.0]), np.stack([outer["a"][1], outer["b"][0]])
    assert inner[2] == pytest.approx(0.9 * (weights @ own) / 7)


def test_a_correction_step_is_sgd_on_the_mean_loss() -> None:
    torch.manual_seed(0)
    model, points = mlp([WIDTH, 2]).double(), part(5, 4)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    mean = sum(loss(model, points.batch(torch.tensor([i])))[0] for i in range(5)) / 5
    slopes = torch.autograd.grad(mean, list(model.parameters()))
    descend(model, points, 0.1)
    for (name, after), slope in zip(model.named_parameters(), slopes, strict=True):
        torch.testing.assert_close(after.detach(), before[name] - 0.1 * slope)
