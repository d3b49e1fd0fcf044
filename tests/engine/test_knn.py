from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from engine import knn
from engine.knn import KINDS, build_neighbours, probe, probed, ready_to_search, recall, search, widen
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


def test_places_that_no_row_fills_are_not_found() -> None:
    exact = np.array([[1, 2, -1, -1], [3, -1, -1, -1], [-1, -1, -1, -1]])
    assert recall(np.array([[1, 9, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]]), exact) == 0.25
    assert recall(np.full((2, 3), -1), np.full((2, 3), -1)) == 1.0  # nothing to find
    index, exact = index_of("ivf", 1, 300), np.full((2, 3, 1200), -1)
    exact[..., :300] = IDS[:300]  # all of them, asked for four times as many
    assert min(widen(index, QUERIES, exact)) == 1.0
    looked = probed(index)
    assert looked is not None
    assert looked[0] == looked[1]


def test_rows_too_large_for_half_precision_are_refused() -> None:
    vectors = np.full((50, 4), 1e5, dtype=np.float32)
    with pytest.raises(ValueError, match="output.neighbours=sqfp16 cannot hold 1e\\+05"):
        build_neighbours("sqfp16", [(np.arange(50), vectors)], 50, 4)
    build_neighbours("ivf", [(np.arange(50), vectors)], 50, 4)


def test_lists_are_searched_until_either_side_is_found() -> None:
    index, exact = index_of("ivf"), exact_ids(10)
    probe(index, 1)
    before = [recall(search(index, QUERIES, 10)[0][side], exact[side]) for side in (0, 1)]
    assert min(before) < 0.95
    reached = widen(index, QUERIES, exact)
    assert min(reached) >= 0.95
    assert reached == tuple(recall(search(index, QUERIES, 10)[0][side], exact[side]) for side in (0, 1))
    looked = probed(index)
    assert looked is not None
    assert 1 < looked[0] <= looked[1]


def test_recall_is_of_each_side_alone_and_stops_at_all_lists() -> None:
    index, exact = index_of("ivf"), exact_ids(10)
    exact[1] += 10**9  # opponents that no search can find
    assert widen(index, QUERIES, exact) == (1.0, 0.0)
    assert probed(index) == (faiss.extract_index_ivf(index.index).nlist,) * 2
    assert widen(index_of("sqfp16"), QUERIES, exact)[0] >= 0.95  # nothing to widen
    assert probed(index_of("sqfp16")) is None


class FakeGpu:
    """The part of a GPU build of FAISS that is called, on the CPU: it writes down what moves where."""

    def __init__(self, gpus: int) -> None:
        self.moves: list[tuple[Any, ...]] = []
        self.gpus = gpus

    def __getattr__(self, name: str) -> Any:
        return getattr(faiss, name)

    def StandardGpuResources(self) -> str:  # noqa: N802  FAISS's name
        return "resources"

    def GpuClonerOptions(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(use_cuvs=True)

    def get_num_gpus(self) -> int:
        return self.gpus

    def index_cpu_to_gpu(self, resources: str, device: int, index: Any, options: SimpleNamespace) -> Any:
        self.moves.append(("to the GPU", resources, device, index.ntotal, options.use_cuvs))
        return faiss.clone_index(index)

    def index_gpu_to_cpu(self, index: Any) -> Any:
        self.moves.append(("back", index.ntotal))
        return faiss.clone_index(index)


def test_lists_are_built_on_a_gpu_and_any_index_is_searched_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(gpus=2)
    monkeypatch.setattr(knn, "faiss_module", lambda: fake)
    index = index_of("ivf")
    assert fake.moves == [("to the GPU", "resources", 0, 0, True), ("back", 600)]
    probe(index, 10_000)
    assert np.array_equal(search(ready_to_search(index, 10), QUERIES, 10)[0], exact_ids(10))
    assert fake.moves[2:] == [("to the GPU", "resources", 0, 600, True)]
    fake.moves.clear()
    half = index_of("sqfp16")  # half precision would come back as single
    assert fake.moves == []
    ready_to_search(half, 10)
    assert fake.moves == [("to the GPU", "resources", 0, 600, False)]  # which cuVS has not
    fake.moves.clear()
    assert ready_to_search(half, 2049) is half  # more than a GPU takes
    assert fake.moves == []


def test_a_gpu_build_without_a_gpu_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(gpus=0)
    monkeypatch.setattr(knn, "faiss_module", lambda: fake)
    index = index_of("ivf")
    assert ready_to_search(index, 10) is index
    assert fake.moves == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_those_of_the_cpu(kind: str) -> None:
    """On a machine with a GPU and its FAISS this builds and searches there; elsewhere on the CPU."""
    index = index_of(kind)
    reached = widen(index, QUERIES, exact_ids(10))
    assert min(reached) >= 0.95
    ids, scores = search(ready_to_search(index, 10), QUERIES, 10)
    there, same = search(index, QUERIES, 10)
    assert recall(ids.reshape(6, 10), there.reshape(6, 10)) >= 0.95
    assert np.allclose(scores, same, rtol=1e-2, atol=1e-2)
