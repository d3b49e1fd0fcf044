"""Nearest neighbours by inner product for new queries: FAISS over concatenated rows.

TracIn appendix C: with √η_i g_i(z) side by side for all checkpoints i, one inner product of two such vectors is the whole
Σ_i η_i g_i(z)·g_i(z′). Proponents are the neighbours of q, opponents those of −q.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

KINDS = ("ivf", "sqfp16")
_TRAINING_ROWS = 100_000


def faiss_module() -> Any:
    """Return faiss. Raises ValueError saying how to install it."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ValueError(
            "output.neighbours needs FAISS: install the extra `cpu`, `gpu` or `gpu-cuvs`, or use exact"
        ) from error
    return faiss


def build_neighbours(kind: str, blocks: Iterable[tuple[np.ndarray, np.ndarray]], count: int, width: int) -> Any:
    """Return an index over blocks of (ids int64 [n], vectors float32 [n, width]); `count` rows are expected.

    "ivf": inverted lists, about 4·√N of them, trained on the first blocks. "sqfp16": a flat scan in half precision.
    """
    faiss = faiss_module()
    if kind not in KINDS:
        raise ValueError(f"output.neighbours={kind!r} is not allowed: exact, {', '.join(KINDS)}")
    lists = max(1, min(int(4 * count**0.5), count // 39))
    description = f"IVF{lists},Flat" if kind == "ivf" else "SQfp16"
    index = faiss.IndexIDMap2(faiss.index_factory(width, description, faiss.METRIC_INNER_PRODUCT))
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for ids, vectors in blocks:
        waiting.append((ids, vectors))
        if index.is_trained or sum(len(i) for i, _ in waiting) >= min(count, _TRAINING_ROWS):
            _add(index, waiting)
    _add(index, waiting)
    if kind == "ivf":
        faiss.extract_index_ivf(index.index).nprobe = max(8, lists // 8)
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
    half = type(faiss_module().downcast_index(index.index)).__name__ == "IndexScalarQuantizer"
    if half and largest > float(np.finfo(np.float16).max):
        raise ValueError(f"output.neighbours=sqfp16 cannot hold {largest:.3g} in half precision: use ivf or exact")
    if not index.is_trained:
        index.index.train(vectors)
        index.is_trained = True
    index.add_with_ids(vectors, ids)


def search(index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [2, Q, k] and scores [2, Q, k]: proponents, then opponents, best first; −1 and NaN where there are fewer."""
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    best, near = index.search(queries, k)
    worst, far = index.search(-queries, k)
    ids = np.stack([near, far])
    return ids, np.where(ids < 0, np.nan, np.stack([best, -worst]).astype(np.float64))


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the mean share of the exact ids [Q, k] that were found [Q, k]."""
    shares = [np.isin(e, f).mean() for f, e in zip(found, exact, strict=True)]
    return float(np.mean(shares))
