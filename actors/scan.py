"""The exact scan of a store for new queries: every row against each query, as little else as can be.

A shard's inner chunks are multiplied as they lie in its objects, float16 turned to float32 a chunk at a time; the scale of a
row comes last, on the products (it is a power of two and rounds nothing). Shards are read side by side, by as many threads
as there are cores, and merged in their order, so that the answer depends on none of that.
"""

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from threading import local
from typing import Any

import numpy as np
import torch

from actors.context import WorkerContext
from actors.plan import shards
from actors.score import Part, add_up, state_block
from actors.specs import GradientSpec, ScoreSpec
from engine.methods.contract import Method, QueryState, Rows
from engine.topk import TopK, merge
from storage.corpus import Corpus
from storage.locations import Buffer


def scan(
    context: WorkerContext,
    method: Method,
    spec: ScoreSpec,
    gradients: GradientSpec,
    corpus: Corpus,
    shard_rows: int,
    states: Mapping[str, QueryState],  # by checkpoint, in order of training
    k: int,
    erased: Collection[int] = (),
    threads: int | None = None,  # None: as many as there are cores
) -> TopK:
    """Return the top-k of all stored rows for the queries of these states. Memory: one shard a thread."""
    asked, segments = replace(spec, top_k=k, dense=False), {s.name: s for s in corpus.segments}
    plain = not context.hold_all and method.reads == "gradients" and _is_plain(context, spec)
    count = 1 if context.hold_all else threads or os.cpu_count() or 1

    held = local()  # a thread reads one shard after another into the same memory

    def one(at: dict[str, Any]) -> TopK:
        buffer = held.__dict__.setdefault("buffer", Buffer())
        ids = segments[at["segment"]].base + np.arange(at["start"], at["stop"], dtype=np.int64)
        parts = (
            (product_part(context, method, spec, gradients, at, ids, name, state, buffer) if plain else None)
            or state_block(context, spec, gradients, at, ids, name, [state], state.weight, len(state.losses))
            for name, state in states.items()
        )
        return add_up(ids, parts, asked, erased=erased).top

    pieces, top = iter(shards(corpus, shard_rows)), None
    with ThreadPoolExecutor(count) as pool:
        while wave := list(islice(pieces, 4 * count)):  # no more results wait than are merged soon
            for here in pool.map(one, wave):
                top = here if top is None else merge(top, here, k)
    assert top is not None
    return top


def _is_plain(context: WorkerContext, spec: ScoreSpec) -> bool:
    """Tell whether a store's rows can be multiplied as they lie there."""
    settings = context.store(spec.home).settings
    return settings.compression == "none" and settings.dtype in ("float16", "float32")


def product_part(
    context: WorkerContext, method: Method, spec: ScoreSpec, gradients: GradientSpec, at: dict[str, Any],
    ids: np.ndarray, checkpoint: str, state: QueryState, buffer: Buffer,
) -> Part | None:  # fmt: skip
    """Return one checkpoint's block of a shard; None for one that is not whole: reading it as usual says what it lacks."""
    store, place = context.store(spec.home), (spec.corpus, checkpoint, at["segment"], at["start"])
    try:
        vectors = store.vectors(*place)
        products = torch.zeros(len(ids), len(state.losses))
        for name, where, values in store.stored_columns(*place, buffer):
            products.addmm_(torch.from_numpy(values).float(), state.arrays[name][:, where].float().T)
    except (FileNotFoundError, ValueError):
        return None
    if "row_scale" in vectors:
        products *= torch.from_numpy(vectors["row_scale"])[:, None]
    norms = torch.from_numpy(vectors["norms"]) if "norms" in vectors else None
    rows = Rows(torch.from_numpy(ids), {}, norms, gradients.parameters, products)
    block = method.score(rows, state)
    return Part(state.weight, vectors["state"], vectors["losses"], len(state.losses), iter([block]))
