"""Candidates of every query: the nearest training examples by their features, and the probes of what they miss.

An id is always an example's own, never a row of an index. A query that is itself a training example, which is one with the
same source id and the same content, is no candidate of its own; other duplicates are.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy

from actors.features import features_key
from engine.counters import derive_key, words
from engine.knn import faiss_module
from engine.methods.nearest import Nearest, estimated_recall
from engine.topk import TopK
from storage.corpus import Corpus
from storage.locations import Location
from storage.rows import OWN

PROBED = 16  # queries whose recall is estimated


def find_candidates(
    run: Location, train: Corpus, queries: Corpus, pieces: list[dict[str, Any]], asked: list[dict[str, Any]],
    folder: str, nearest: Nearest, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return candidates [Q, k] by distance and probes [Q, s], int64, −1 where there are fewer, and `others` [Q]: of how
    many the probes were drawn. Raises FloatingPointError for queries whose features are not finite.

    `pieces` and `asked` are the payloads of the features' units, `folder` is where they left them.
    """
    vectors = np.concatenate([part for _, part in read_features(run, queries, asked, folder)])
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(1))):
        raise FloatingPointError(
            f"features of queries {bad[:5].tolist()} are not finite, so nothing is near: leave them out"
        )
    if nearest.anchors:
        vectors = vectors.mean(0, keepdims=True)
    own = own_ids(train, queries)
    more = max((len(ids) for ids in own.values()), default=0)  # so that k are left without the query's own
    found = search_nearest(read_features(run, train, pieces, folder), vectors, nearest.count + more)
    everyone = np.setdiff1d(np.arange(train.rows, dtype=np.int64), np.fromiter(train.erased(), np.int64))
    sample = set(np.linspace(0, queries.rows - 1, min(PROBED, queries.rows)).astype(np.int64).tolist())
    candidates, probes, others = [], [], []
    for query in range(queries.rows):
        near, self_ = found[0 if nearest.anchors else query], own.get(query, np.empty(0, np.int64))
        kept = near[(near >= 0) & ~np.isin(near, self_)][: nearest.count]
        rest = np.setdiff1d(everyone, np.concatenate([kept, self_]))
        drawn = np.argsort(words(derive_key(seed, "probes", query), 0, len(rest)), kind="stable")
        candidates.append(filled(kept, nearest.count))
        probes.append(filled(np.sort(rest[drawn[: nearest.recall_sample]]) if query in sample else rest[:0],
                             nearest.recall_sample))  # fmt: skip
        others.append(len(rest))
    return {"candidates": np.stack(candidates), "probes": np.stack(probes), "others": np.array(others)}


def filled(ids: np.ndarray, length: int) -> np.ndarray:
    return np.pad(ids, (0, length - len(ids)), constant_values=-1)


def recall_of(top: TopK, probes: np.ndarray, others: np.ndarray, k: int) -> dict[str, float]:
    """Return the estimated recall of the m strongest by m, the mean over the queries with probes [p, 2]: query, score."""
    found = {}
    for m in (m for m in (1, 10, 100) if m <= min(k, top.ids.shape[2])):
        shares = []
        for query in np.unique(probes[:, 0]).astype(int):
            strongest = dict(zip(top.ids[:, query].ravel(), top.scores[:, query].ravel(), strict=True))
            scores = np.array([score for example, score in strongest.items() if example >= 0])
            shares.append(estimated_recall(scores, probes[probes[:, 0] == query, 1], int(others[query]), m))
        if shares:
            found[str(m)] = float(np.mean(shares))
    return found


def read_features(
    run: Location, corpus: Corpus, pieces: list[dict[str, Any]], folder: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and features of a shard at a time."""
    bases = {segment.name: segment.base for segment in corpus.segments}
    for at in pieces:
        ids = bases[at["segment"]] + np.arange(at["start"], at["stop"], dtype=np.int64)
        kept = ~np.isin(ids, np.fromiter(corpus.erased(), np.int64))
        yield ids[kept], safetensors.numpy.load(run.read(features_key(folder, at)))["features"][kept]


def search_nearest(
    shards: Iterator[tuple[np.ndarray, np.ndarray]],  # ids [n], features [n, H]; NaN: left out
    vectors: np.ndarray,  # float32 [Q, H], finite
    k: int,
) -> np.ndarray:  # int64 [Q, k]
    """Return the ids of the nearest by L2 distance, nearest first, ties by id; −1 where there are fewer. Exact."""
    ids = np.full((len(vectors), k), -1, dtype=np.int64)
    distances = np.full((len(vectors), k), np.inf, dtype=np.float32)
    for own, features in shards:
        good = np.isfinite(features).all(1)
        own, features = own[good], features[good]
        if not len(own):
            continue
        near, rows = faiss_module().knn(vectors, np.ascontiguousarray(features), min(k, len(own)))
        both = np.concatenate([distances, near], 1), np.concatenate([ids, own[rows]], 1)
        order = np.lexsort((both[1], both[0]))[:, :k]
        distances, ids = (np.take_along_axis(one, order, 1) for one in both)
    return ids


def own_ids(train: Corpus, queries: Corpus) -> dict[int, np.ndarray]:
    """Return, for every query that is in train, which ids it has there."""
    rows = [row for s in queries.segments for row in queries.read(s, 0, s.rows)]
    wanted: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        wanted.setdefault(row["source_id"], []).append(position)
    found: dict[int, list[int]] = {}
    example = 0
    for batch in train.column("source_id"):
        for source_id in batch.column(0).to_pylist():
            for position in wanted.get(source_id, []):
                if example not in train.erased() and same_content(train.row(example), queries.row(position)):
                    found.setdefault(position, []).append(example)
            example += 1
    return {position: np.array(ids, dtype=np.int64) for position, ids in found.items()}


def same_content(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Tell whether two records hold the same in all fields that are the corpus's own."""
    a, b = ({name: value for name, value in row.items() if name not in OWN} for row in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[n]), np.asarray(b[n])) for n in a)
