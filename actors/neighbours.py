"""A FAISS index for new queries, and the exact scan that it is measured against.

The vectors are rows scaled so that the method's score is one inner product, all checkpoints side by side.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from actors.index import IndexJob, merged_top
from actors.states import load_state
from engine.knn import build_neighbours, faiss_module, recall, search
from engine.methods.contract import Method, QueryState, load_method
from engine.topk import TopK
from storage.corpus import Corpus
from storage.gradients import DONE, GradientStore
from storage.locations import Location


def build_neighbour_index(job: IndexJob, kind: str, say: Callable[[str], None]) -> None:
    """Build the index unless it is there, and say its recall@100, both ends, against the exact answers on stored queries."""
    key = index_key(job.score.label, kind)
    if job.run.exists(key):
        return
    method = load_method(job.score.method, job.score.method_settings)
    states = {name: load_state(job.run, job.score.label, name) for name in job.score.checkpoints}
    queries = query_vectors(method, list(states.values()))
    count = sum(p["stop"] - p["start"] for p in job.shards)
    index = build_neighbours(kind, row_vectors(job, method, states), count, queries.shape[1])
    exact = merged_top(job)
    k = min(100, exact.ids.shape[2])
    found, _ = search(index, queries, k)
    measured = np.mean([recall(found[side], exact.ids[side][:, :k]) for side in (0, 1)])
    job.run.create(key, faiss_module().serialize_index(index).tobytes())
    say(
        f"{kind} index of {count:,} rows × {queries.shape[1]:,}: recall@{k} {measured:.3f} on {len(queries)} stored queries"
    )


def row_vectors(
    job: IndexJob, method: Method, states: dict[str, QueryState]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and vectors of a shard at a time, quarantined examples left out."""
    store = GradientStore.open(job.home)
    segments = {s.name: s for s in Corpus.open(job.home, job.score.corpus).segments}
    for piece in job.shards:
        parts, good = [], np.ones(piece["stop"] - piece["start"], dtype=bool)
        for name, state in states.items():
            block = store.read(job.score.corpus, name, piece["segment"], piece["start"], piece["stop"])
            norms = None if block.norms is None else torch.from_numpy(block.norms)
            parts.append(scaled(method, {n: torch.from_numpy(a) for n, a in block.rows.items()}, norms, state))
            good &= block.state == DONE
        ids = segments[piece["segment"]].base + np.arange(piece["start"], piece["stop"], dtype=np.int64)
        yield ids[good], torch.cat(parts, 1).numpy()[good]


def query_vectors(method: Method, states: list[QueryState]) -> np.ndarray:
    """Return prepared queries as the index is asked, float32 [Q, width]."""
    return torch.cat([scaled(method, state.arrays, state.norms, state) for state in states], 1).numpy()


def scaled(method: Method, arrays: dict[str, Tensor], norms: Tensor | None, state: QueryState) -> Tensor:
    """Return one checkpoint's part of the vectors, float32 [n, columns]: both sides are scaled alike."""
    scale = method.scale(norms, state)
    return torch.cat([arrays[name] * scale for name in state.arrays], 1).float()


def index_key(label: str, kind: str) -> str:
    return f"index/{label}/neighbours-{kind}.faiss"


def search_neighbours(run: Location, label: str, kind: str, method: Method, states: list[QueryState], k: int) -> TopK:
    """Return the top-k that the index finds. Its scores are the method's own, up to float32 (sqfp16: float16) rounding."""
    index = faiss_module().deserialize_index(np.frombuffer(run.read(index_key(label, kind)), dtype=np.uint8))
    return TopK(*search(index, query_vectors(method, states), min(k, index.ntotal)))


def built_kinds(run: Location, label: str) -> list[str]:
    """Return which neighbour indices a label has."""
    names = [key.rpartition("/")[2] for key in run.list(f"index/{label}")]
    return [n.removeprefix("neighbours-").removesuffix(".faiss") for n in names if n.startswith("neighbours-")]
