"""The exact reference of the FastIF experiments, and LiSSA in the span of its rows, against dense matrices; the guard."""

import pytest
import torch
from torch import Tensor, nn

from engine.coordinates import chosen_coordinates
from engine.solvers import finish
from engine.stochastic_solvers import Lissa, lissa_repetition
from engine.stochastic_solvers import batch_scale as engine_scale
from launch.experiments import fastif_minilm as minilm
from launch.experiments import fastif_span as span
from launch.experiments.fastif_guard import agreement, guarded, pearson
from launch.experiments.registry import Gate
from launch.experiments.subjects import Part, Subject, logits, loss, mlp
from tests import oracles
from tests.conftest import Caught

WIDTH, ROWS, DAMPING = 5, 14, 0.03


def part(count: int, seed: int) -> Part:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return Part(inputs, torch.randint(0, 2, (count,), generator=generator))


@pytest.fixture
def subject() -> minilm.MiniLM:
    """A small network of two classes in the place of the language model."""
    torch.manual_seed(0)
    model = mlp([WIDTH, 4, 2]).double()
    data = Subject({"train": part(30, 1), "test": part(6, 2)}, lambda: model, 2)
    return minilm.MiniLM(data, model, chosen_coordinates(model, ["*"]))


@pytest.fixture
def reference(subject: minilm.MiniLM) -> minilm.Reference:
    rows = subject.train.take(torch.arange(ROWS))
    return minilm.Reference(subject.model, subject.coordinates, rows, minilm.gram(subject.model, rows, columns=7))


@pytest.fixture
def matrix(subject: minilm.MiniLM, reference: minilm.Reference) -> Tensor:
    """The mean Gauss-Newton matrix, by every logit's gradient and the softmax's own second derivative."""
    batch, names = reference.rows.batch(torch.arange(ROWS)), [w.name for w in subject.coordinates.weights]
    total = oracles.gauss_newton(subject.model, logits, lambda out, _: oracles.softmax_hessian(out), batch, names)
    return total / ROWS


@pytest.fixture
def asked(subject: minilm.MiniLM) -> Tensor:
    return minilm.query_gradients(subject, subject.subject.parts["test"])


def without_second_derivative(model: nn.Module, batch) -> Tensor:
    out = logits(model, batch)
    return out[:, 1] - out[:, 0]


def test_the_solve_is_that_of_the_whole_matrix(
    subject: minilm.MiniLM, reference: minilm.Reference, matrix: Tensor, asked: Tensor, caught: Caught
) -> None:
    truth = torch.linalg.solve(matrix + DAMPING * torch.eye(len(matrix), dtype=torch.float64), asked)

    def compare() -> None:
        made = minilm.Reference(
            subject.model, subject.coordinates, reference.rows, minilm.gram(subject.model, reference.rows, columns=7)
        )
        torch.testing.assert_close(made.solve(asked, DAMPING), truth, rtol=1e-9, atol=1e-12)

    caught(compare, minilm, "margin", without_second_derivative)
    assert reference.largest == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-10)
    wrong = minilm.Reference(subject.model, subject.coordinates, reference.rows, reference.gram / ROWS)
    assert (wrong.solve(asked, DAMPING) - truth).abs().max() > 0.01 * truth.abs().max()  # nλI without n


def test_the_gram_matrix_does_not_depend_on_how_many_columns_are_held(reference: minilm.Reference) -> None:
    rows = minilm.select_parameters(reference.model, ["*"])
    whole = minilm.held_columns(reference.model, reference.rows, rows, 0, 10_000)
    assert whole.shape == (ROWS, reference.coordinates.size)
    for columns in (1, 5, 10_000):
        torch.testing.assert_close(minilm.gram(reference.model, reference.rows, columns), whole @ whole.T)


def test_scores_are_the_products_over_the_number_of_examples(subject: minilm.MiniLM, asked: Tensor) -> None:
    batch = subject.train.batch(torch.arange(30))
    own = oracles.gradients(subject.model, loss, batch)
    truth = oracles.flat(own, [w.name for w in subject.coordinates.weights]) @ asked / 30
    torch.testing.assert_close(minilm.influence_on(subject, asked), truth)


def test_lissa_in_the_span_is_lissa_on_the_weights(
    subject: minilm.MiniLM, reference: minilm.Reference, asked: Tensor, caught: Caught
) -> None:
    ids, curvature = torch.arange(ROWS), minilm.operator(subject, reference.rows)
    for size in (1, 3):
        scale = span.batch_scale(reference.gram, size)
        assert scale == pytest.approx(engine_scale(curvature, ids, size), rel=1e-3)
        settings = Lissa(DAMPING, scale, 40, size, 2, seed=5)

        def compare(settings: Lissa = settings) -> None:
            inner = span.span_of(reference, asked, settings.scale)
            found = span.repetitions(inner, settings, reference.largest)
            for t in range(2):
                truth = finish(lissa_repetition(curvature, asked, ids, settings, t, reference.largest))
                torch.testing.assert_close(
                    span.expanded(reference, inner, found[t], asked), truth, rtol=1e-8, atol=1e-10
                )

        caught(compare, minilm, "margin", without_second_derivative)


def test_exact_solve_margins_and_lengths_in_the_span(reference: minilm.Reference, asked: Tensor) -> None:
    inner = span.span_of(reference, asked, scale=2.0)
    block, truth = span.exact_in_span(inner, DAMPING), reference.solve(asked, DAMPING)
    torch.testing.assert_close(span.expanded(reference, inner, block, asked), truth)
    torch.testing.assert_close(span.margins(inner, block), reference.times(truth))
    torch.testing.assert_close(span.lengths(inner, block, asked.square().sum(0)), truth.norm(dim=0))


def test_a_guard_that_fails_makes_the_judged_numbers_void() -> None:
    gates = [Gate("pearson", 0.99, (0.98, 1.0), 0.95), Gate("seconds", 3.0)]
    assert guarded(gates, 0.1, [0.9, 0.98])[:2] == gates
    for damping, alike in ((0.11, [0.5]), (0.01, [0.98])):
        void, reported, *_ = guarded(gates, damping, alike)
        assert (void.name, void.record()["pass"]) == ("pearson (void: the guard fails)", False)
        assert reported == gates[1]


def test_correlations_are_by_query() -> None:
    a = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert pearson(a, a * torch.tensor([2.0, -1.0])) == pytest.approx([1, -1])
    assert agreement(a[:, 0].numpy(), a[:, 1].numpy())["kendall"] == 1
