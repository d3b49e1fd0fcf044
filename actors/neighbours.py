"""A FAISS index for new queries, its recall against the exact scan, and which of the two answers by default.

The vectors are rows scaled so that the method's score is one inner product, all checkpoints side by side.
"""

from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.index import IndexJob, merged_top
from actors.states import load_state
from engine.knn import ENOUGH, build_neighbours, faiss_module, probed, ready_to_search, search, widen
from engine.methods.contract import Method, QueryState, load_method
from engine.topk import TopK, without
from storage.corpus import Corpus
from storage.gradients import DONE, GradientStore
from storage.locations import Location

EXACT = "exact"
_SAMPLE = 200  # stored queries that recall is measured on


def answer_with(job: IndexJob, kind: str, say: Callable[[str], None]) -> None:
    """Make `kind` the search that answers new queries of this label from now on; build its index unless it is there."""
    run, label = job.run, job.score.label
    if kind != EXACT:
        build_neighbour_index(job, kind, say)
    if chosen_search(run, label) != kind:
        run.create_json(f"index/{label}/search.{len(_choices(run, label)):06d}.json", {"search": kind})


def chosen_search(run: Location, label: str) -> str:
    """Return what answers new queries of a label: exact, unless the last job over it asked for a neighbour index."""
    choices = _choices(run, label)
    return run.read_json(choices[-1])["search"] if choices else EXACT


def _choices(run: Location, label: str) -> list[str]:
    return sorted(key for key in run.list(f"index/{label}") if key.rpartition("/")[2].startswith("search."))


def build_neighbour_index(job: IndexJob, kind: str, say: Callable[[str], None]) -> None:
    """Build the index unless it is there, look wide enough for the stored queries, and say and record its recall.

    Recall is of the stored top-k on either side, over at most 200 stored queries, against the exact answers.
    """
    label = job.score.label
    if job.run.exists(about_key(label, kind)):
        return
    method = load_method(job.score.method, job.score.method_settings)
    states = {name: load_state(job.run, label, name) for name in job.score.checkpoints}
    queries = query_vectors(method, list(states.values()))
    count = sum(p["stop"] - p["start"] for p in job.shards)
    index = build_neighbours(kind, row_vectors(job, method, states), count, queries.shape[1])
    sample = np.unique(np.linspace(0, len(queries) - 1, min(_SAMPLE, len(queries))).astype(np.int64))
    exact = merged_top(job).ids[:, sample]
    reached = widen(index, queries[sample], exact)
    looked = probed(index)
    about = {
        "search": kind, "rows": index.ntotal, "columns": queries.shape[1], "queries": len(sample), "k": exact.shape[2],
        "recall": {"proponents": reached[0], "opponents": reached[1]},
        "lists": None if looked is None else {"searched": looked[0], "of": looked[1]},
    }  # fmt: skip
    job.run.delete(index_key(label, kind))  # of a job that was killed here
    job.run.create(index_key(label, kind), faiss_module().serialize_index(index).tobytes())
    job.run.create_json(about_key(label, kind), about)
    say(described(about))


def described(about: dict[str, Any]) -> str:
    """Return one line on a neighbour index: what it holds and how much of the exact answers it finds."""
    lists, found = about["lists"], about["recall"]
    wide = "" if lists is None else f", {lists['searched']:,} of {lists['of']:,} lists searched"
    short = "" if min(found.values()) >= ENOUGH else f"; below {ENOUGH}: output.neighbours=exact misses none"
    return (
        f"{about['search']} index of {about['rows']:,} rows × {about['columns']:,}{wide}: recall@{about['k']} "
        f"{found['proponents']:.3f} of proponents, {found['opponents']:.3f} of opponents, on {about['queries']} stored "
        f"queries{short}"
    )


def row_vectors(
    job: IndexJob, method: Method, states: dict[str, QueryState]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and vectors of a shard at a time, quarantined examples left out."""
    store = GradientStore.open(job.home)
    corpus = Corpus.open(job.home, job.score.corpus)
    segments, erased = {s.name: s for s in corpus.segments}, list(corpus.erased())
    for piece in job.shards:
        parts, good = [], np.ones(piece["stop"] - piece["start"], dtype=bool)
        for name, state in states.items():
            block = store.read(job.score.corpus, name, piece["segment"], piece["start"], piece["stop"])
            norms = None if block.norms is None else torch.from_numpy(block.norms)
            parts.append(scaled(method, {n: torch.from_numpy(a) for n, a in block.rows.items()}, norms, state))
            good &= block.state == DONE
        ids = segments[piece["segment"]].base + np.arange(piece["start"], piece["stop"], dtype=np.int64)
        good &= ~np.isin(ids, erased)
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


def about_key(label: str, kind: str) -> str:
    return f"index/{label}/neighbours-{kind}.json"


def about_search(run: Location, label: str, kind: str) -> dict[str, Any] | None:
    """Return what was recorded of a neighbour index when it was built; None for the exact search."""
    return None if kind == EXACT else run.read_json(about_key(label, kind))


def search_neighbours(
    run: Location, label: str, kind: str, method: Method, states: list[QueryState], k: int,
    erased: Collection[int] = (),
) -> TopK:  # fmt: skip
    """Return the top-k that the index finds. Its scores are the method's own, up to float32 (sqfp16: float16) rounding.

    Erased examples may still be in the index: so many more are looked for, and left out.
    """
    wide = k + len(erased)
    index = open_index(run, index_key(label, kind), wide)
    top = without(TopK(*search(index, query_vectors(method, states), min(wide, index.ntotal))), erased)
    return TopK(top.ids[:, :, :k], top.scores[:, :, :k])


@lru_cache(maxsize=1)
def open_index(run: Location, key: str, k: int) -> Any:
    """Return a stored index, ready to find k neighbours; the last one stays open for the next question."""
    stored = np.frombuffer(run.read(key), dtype=np.uint8)
    return ready_to_search(faiss_module().deserialize_index(stored), k)
