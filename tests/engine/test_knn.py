import numpy as np
import pytest

from engine.knn import KINDS, build_neighbours, recall, search
from tests import oracles

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(600, 8)).astype(np.float32)
QUERIES = RNG.normal(size=(3, 8)).astype(np.float32)
IDS = RNG.permutation(600) + 2**40


def index_of(kind: str, blocks: int = 3, rows: int = 600):
    parts = zip(np.array_split(IDS[:rows], blocks), np.array_split(VECTORS[:rows], blocks), strict=True)
    return build_neighbours(kind, parts, rows, 8)


def exact_ids(k: int) -> np.ndarray:
    ends = oracles.top_k(IDS, (VECTORS.astype(np.float64) @ QUERIES.T.astype(np.float64)), k)
    return np.array([[[i for _, i in query] for query in end] for end in ends])


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_are_found_with_the_ids_of_the_rows(kind):
    ids, scores = search(index_of(kind), QUERIES, 10)
    assert ids.shape == scores.shape == (2, 3, 10)
    by_id = dict(zip(IDS.tolist(), VECTORS @ QUERIES.T, strict=True))
    for end in range(2):
        for q in range(3):
            truth = [by_id[i][q] for i in ids[end, q].tolist()]
            assert np.allclose(scores[end, q], truth, atol=0.05)
            assert (np.diff(scores[end, q]) * (1 if end else -1) >= 0).all()
    assert recall(ids.reshape(6, 10), exact_ids(10).reshape(6, 10)) >= (0.95 if kind == "sqfp16" else 0.5)


def test_inverted_lists_searched_in_full_are_exact():
    import faiss

    index = index_of("ivf")
    faiss.extract_index_ivf(index.index).nprobe = 10_000
    assert np.array_equal(search(index, QUERIES, 10)[0], exact_ids(10))


def test_blocks_in_any_number_give_the_same_neighbours():
    found = [search(index_of("sqfp16", blocks), QUERIES, 5)[0] for blocks in (1, 7)]
    assert recall(found[0].reshape(6, 5), found[1].reshape(6, 5)) >= 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_rows_than_asked_are_marked(kind):
    ids, scores = search(index_of(kind, 1, 4), QUERIES, 6)
    assert (ids[..., 4:] == -1).all()
    assert np.isnan(scores[..., 4:]).all()
    assert np.isfinite(scores[..., :4]).all()


def test_nan_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        build_neighbours("sqfp16", [(IDS[:2], np.full((2, 8), np.nan, dtype=np.float32))], 2, 8)
    with pytest.raises(ValueError, match=r"output.neighbours='hnsw' is not allowed"):
        build_neighbours("hnsw", [], 0, 8)


def test_recall_counts_the_exact_ids_found():
    assert recall(np.array([[1, 2], [5, 6]]), np.array([[2, 3], [6, 5]])) == 0.75


def test_rows_too_large_for_half_precision_are_refused() -> None:
    vectors = np.full((50, 4), 1e5, dtype=np.float32)
    with pytest.raises(ValueError, match="output.neighbours=sqfp16 cannot hold 1e\\+05"):
        build_neighbours("sqfp16", [(np.arange(50), vectors)], 50, 4)
    build_neighbours("ivf", [(np.arange(50), vectors)], 50, 4)
