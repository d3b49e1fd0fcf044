"""Nearest neighbours by inner product for new queries: FAISS over concatenated rows, on a GPU where there is one.

TracIn appendix C: with √η_i g_i(z) side by side for all checkpoints i, one inner product of two such vectors is the whole
Σ_i η_i g_i(z)·g_i(z′). Proponents are the neighbours of q, opponents those of −q.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

KINDS = ("ivf", "sqfp16")
ENOUGH = 0.95  # recall on either side that inverted lists are searched wide enough for
_TRAINING_ROWS = 100_000
_GPU_MOST = 2048  # neighbours, and lists probed, that FAISS takes on a GPU


def faiss_module() -> Any:
    """Return faiss. Raises ValueError saying how to install it."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ValueError(
            "output.neighbours and method fastif need FAISS: install the extra `cpu`, `gpu` or `gpu-cuvs`"
        ) from error
    return faiss


def has_gpu() -> bool:
    """Tell whether this FAISS was built for GPUs and sees one."""
    faiss = faiss_module()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def on_gpu(index: Any) -> Any:
    """Return a copy of the index on the first GPU."""
    faiss = faiss_module()
    options = faiss.GpuClonerOptions()
    if _is_half(index):
        options.use_cuvs = False  # which has no flat index in half precision
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def build_neighbours(kind: str, blocks: Iterable[tuple[np.ndarray, np.ndarray]], count: int, width: int) -> Any:
    """Return an index over blocks of (ids int64 [n], vectors float32 [n, width]); `count` rows are expected.

    "ivf": inverted lists, about 4·√N of them, trained on the first blocks; on a GPU if there is one, and back.
    "sqfp16": a flat scan in half precision.
    """
    faiss = faiss_module()
    if kind not in KINDS:
        raise ValueError(f"output.neighbours={kind!r} is not allowed: exact, {', '.join(KINDS)}")
    lists = max(1, min(int(4 * count**0.5), count // 39))
    description = f"IVF{lists},Flat" if kind == "ivf" else "SQfp16"
    index = faiss.IndexIDMap2(faiss.index_factory(width, description, faiss.METRIC_INNER_PRODUCT))
    moved = kind == "ivf" and has_gpu()  # half precision would come back in single precision
    index = on_gpu(index) if moved else index
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for ids, vectors in blocks:
        waiting.append((ids, vectors))
        if index.is_trained or sum(len(i) for i, _ in waiting) >= min(count, _TRAINING_ROWS):
            _add(index, waiting)
    _add(index, waiting)
    index = faiss.index_gpu_to_cpu(index) if moved else index
    if kind == "ivf":
        probe(index, max(8, lists // 8))
    return index


def _add(index: Any, waiting: list[tuple[np.ndarray, np.ndarray]]) -> None:
    if not waiting:
        return
    ids = np.concatenate([i for i, _ in waiting])
    vectors = np.ascontiguousarray(np.concatenate([v for _, v in waiting]), dtype=np.float32)
    waiting.clear()
    if not np.isfinite(vectors).all():
        raise ValueError("vectors for the neighbour index hold NaN or infinity: leave quarantined rows out")
    largest = float(np.abs(vectors).max(initial=0.0))
    if _is_half(index) and largest > float(np.finfo(np.float16).max):
        raise ValueError(f"output.neighbours=sqfp16 cannot hold {largest:.3g} in half precision: use ivf or exact")
    if not index.is_trained:
        index.index.train(vectors)
        index.is_trained = True
    index.add_with_ids(vectors, ids)


def _is_half(index: Any) -> bool:
    return type(faiss_module().downcast_index(index.index)).__name__ == "IndexScalarQuantizer"


def _lists(index: Any) -> Any:
    """Return the inverted lists inside an index, None if it has none."""
    return None if _is_half(index) else faiss_module().extract_index_ivf(index.index)


def probe(index: Any, lists: int) -> None:
    """Let searches look into so many inverted lists, at most all."""
    inner = _lists(index)
    inner.nprobe = min(lists, inner.nlist)


def probed(index: Any) -> tuple[int, int] | None:
    """Return how many inverted lists a search looks into, and how many there are; None for a flat index."""
    inner = _lists(index)
    return None if inner is None else (inner.nprobe, inner.nlist)


def widen(index: Any, queries: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Return the recall of the exact ids [2, Q, k] on both sides, a quarter more lists searched until it is enough."""
    while True:
        found, _ = search(index, queries, exact.shape[2])
        reached = (recall(found[0], exact[0]), recall(found[1], exact[1]))
        looked = probed(index)
        if min(reached) >= ENOUGH or looked is None or looked[0] == looked[1]:
            return reached
        probe(index, looked[0] * 5 // 4 + 1)


def ready_to_search(index: Any, k: int) -> Any:
    """Return the index where it is fastest: on a GPU if there is one that takes so many neighbours and lists."""
    lists = (probed(index) or (0, 0))[0]
    return on_gpu(index) if has_gpu() and max(k, lists) <= _GPU_MOST else index


def search(index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [2, Q, k] and scores [2, Q, k]: proponents, then opponents, best first; −1 and NaN where there are fewer."""
    both = np.ascontiguousarray(np.concatenate([queries, -queries]), dtype=np.float32)
    scores, ids = index.search(both, k)  # a core for each side of a single query
    scores, ids = (one.reshape(2, len(queries), k) for one in (scores, ids))
    signs = np.array([1.0, -1.0])[:, None, None]
    return ids, np.where(ids < 0, np.nan, signs * scores)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the mean share of the exact ids [Q, k], −1 where there are fewer, that were found [Q, k]."""
    hits = [np.isin(e[e >= 0], f) for f, e in zip(found, exact, strict=True)]
    shares = [hit.mean() for hit in hits if len(hit)]
    return float(np.mean(shares)) if shares else 1.0
