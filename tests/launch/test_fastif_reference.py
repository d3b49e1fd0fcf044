"""The exact reference of the FastIF experiments, and LiSSA in the span of its rows, against dense matrices; the guard."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.coordinates import chosen_coordinates
from engine.solvers import finish
from engine.stochastic_solvers import Lissa, lissa_repetition
from engine.stochastic_solvers import batch_scale as engine_scale
from launch import validate
from launch.experiments import fastif_minilm as minilm
from launch.experiments import fastif_span as span
from launch.experiments import fastif_speed as speed
from launch.experiments.fastif_guard import agreement, guarded, pearson
from launch.experiments.fastif_head import nearest
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


def test_candidates_are_scored_in_the_span_as_on_the_weights(
    subject: minilm.MiniLM, reference: minilm.Reference, asked: Tensor, caught: Caught
) -> None:
    own = speed.Subject(subject, reference, 0, {})
    near = [[3, 11, 7], [0, 4, 29]]
    inner = span.span_of(reference, asked[:, :2], scale=2.0)
    block = span.exact_in_span(inner, DAMPING)
    truth = minilm.influence_on(subject, span.expanded(reference, inner, block, asked[:, :2])) * len(
        subject.train.labels
    )

    def compare() -> None:
        seen = [speed.Seen.of(own, np.array(ids), asked[:, [q]]) for q, ids in enumerate(near)]
        for q, found in enumerate(speed.scores(seen, inner, block)):
            np.testing.assert_allclose(found, truth[near[q], q], rtol=1e-8, atol=1e-12)

    caught(compare, minilm, "margin", without_second_derivative)
    caught(compare, speed, "loss", lambda model, batch: -loss(model, batch))


def timings(rows: int, k: list[int]) -> dict[str, Any]:
    """Return what a cell measures where the law holds exactly."""
    near = {str(count): 0.5 + 0.001 * rows + 0.02 * count for count in k}
    return {"all": 2 + 0.01 * rows, "search": 0.1 + 0.0002 * rows, "near": near}


def test_the_law_gives_back_the_seconds_and_where_a_speed_up_is_passed() -> None:
    done = {f"of-{rows}": timings(rows, [rows // 100, rows // 10]) for rows in (1000, 2000, 5000)} | {"fast": {}}
    found = speed.law(done)
    assert found.speed_up(100, 3, 8000, 80) == pytest.approx((100 + 82) / (3 + 0.1 + 1.6 + 0.5 + 8 + 1.6))
    fixed = speed.passed(speed.Law(found.every, np.array([0.5, 0, 0.02]), np.array([0.1, 0])), 100, 3, None, 10)
    assert fixed == pytest.approx((80 * 3.8 - 102) / 0.01, rel=0.01)
    assert speed.passed(found, 100, 3, 0.01, 0) is None  # without end it is 0.01 / (0.0002 + 0.001 + 0.0002)


def test_the_cheapest_good_setting_is_taken_and_repetitions_share_the_actors() -> None:
    timed = {"besides": 1.0, "recursion": 0.1}
    settings = [
        {"depth": 10, "repetitions": 1, "dev": 0.90},
        {"depth": 20, "repetitions": 2, "dev": 0.96},
        {"depth": 30, "repetitions": 1, "dev": 0.99},
        {"depth": 9, "repetitions": 4, "dev": 0.95},
    ]
    assert speed.cheapest({"settings": settings}, timed, 2) == (3.0, settings[1])
    assert speed.cheapest({"settings": settings}, timed, 1) == (4.0, settings[2])
    assert speed.cheapest({"settings": settings[:1]}, timed, 1)[1]["dev"] == 0.90


def test_what_is_timed_on_the_actors_is_the_fast_influence() -> None:
    config = validate.experiment_config("fastif.speed", toy=True)
    own = speed.subject_of(config)
    timed = speed.time_fast(config)
    query = own.trained.subject.parts["test"].take(torch.tensor([own.query]))
    b, lissa = minilm.query_gradients(own.trained, query), own.paper["fast"]
    inner = span.span_of(own.exact, b, lissa.scale)
    x = span.expanded(own.exact, inner, span.repetitions(inner, lissa, own.exact.largest).mean(0), b)
    near = nearest(
        minilm.pooled(own.trained, own.trained.train), minilm.pooled(own.trained, query), config["neighbours"]
    )
    truth = minilm.influence_on(own.trained, x)[:, 0]
    assert {int(i) for i in timed["found"]} == set(near[0].tolist())
    for i, score in timed["found"].items():
        assert score == pytest.approx(float(truth[int(i)]), rel=1e-3, abs=1e-3 * float(truth.abs().max()))
