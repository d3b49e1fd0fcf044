"""From a corpus and a model's size to shards: which rows make a unit of work.

The length of a shard follows from bytes, tokens and rows alone, never from a timing, so that every machine cuts alike.
"""

from typing import Any

import numpy as np

from actors.units import Unit
from engine.counters import derive_key, words
from storage.corpus import Corpus
from storage.gradients import shard_rows_for

_FLOPS = 2e12  # of one unit: about 20 s on one CPU core, a second on a GPU
_LEAST, _MOST = 32, 8192
_BLOCK_BYTES = 64 << 20  # of a shard's scores
_PIECES = 16  # a small corpus is still cut, so that workers share it


def shard_rows(corpus: Corpus, model_size: int, columns: int, itemsize: int) -> int:
    """Return the rows of a shard, a power of two: the largest within 16 MiB of rows and 2·10^12 operations."""
    return shard_length(corpus.rows, sum(s.tokens for s in corpus.segments), model_size, columns, itemsize)


def shard_length(rows: int, tokens: int, model_size: int, columns: int, itemsize: int) -> int:
    """Return the same for a corpus of so many rows and tokens."""
    by_bytes = shard_rows_for(columns, itemsize) if columns else _MOST
    by_work = _FLOPS / (4 * model_size * max(1.0, tokens / max(1, rows)))  # forward 2, activation-only backward 2
    by_share = -(-rows // _PIECES)
    return power_below(max(_LEAST, min(by_bytes, by_work, max(_LEAST, by_share), _MOST)))


def forward_rows(corpus: Corpus, work: float, queries: int) -> int:
    """Return the rows of a shard whose every row takes `work` operations and leaves `queries` float64 scores."""
    by_bytes, by_share = _BLOCK_BYTES / (8 * max(1, queries)), max(_LEAST, -(-corpus.rows // _PIECES))
    return power_below(max(1, min(_FLOPS / max(1.0, work), by_bytes, by_share, _MOST)))


def sampled_ids(corpus: Corpus, rows: int | None, seed: int) -> np.ndarray:
    """Return `rows` ids drawn without replacement, or all, ascending, int64; erased examples are left out."""
    ids = np.arange(corpus.rows, dtype=np.int64)
    if erased := corpus.erased():
        ids = np.setdiff1d(ids, np.fromiter(erased, np.int64))
    if rows is None or rows >= len(ids):
        return ids
    order = np.argsort(words(derive_key(seed, "curvature rows"), 0, len(ids)), kind="stable")
    return np.sort(ids[order[:rows]])


def power_below(number: float) -> int:
    """Return the largest power of two that is not above the number."""
    return 1 << (int(number).bit_length() - 1)


def shards(corpus: Corpus, rows: int) -> list[dict[str, Any]]:
    """Return segment, start and stop of every shard, in id order; no shard crosses a segment."""
    return [
        {"segment": segment.name, "start": start, "stop": min(start + rows, segment.rows)}
        for segment in corpus.segments
        for start in range(0, segment.rows, rows)
    ]


def shard_units(pieces: list[dict[str, Any]], name: str) -> list[Unit]:
    """Return one unit per shard of a set."""
    return [Unit(shard_key(name, p), p | {"set": name}) for p in pieces]


def shard_key(name: str, at: dict[str, Any]) -> str:
    """Return the key of a shard of a set; the key of its unit under one checkpoint is <checkpoint>-<this>."""
    return f"{name}-{at['segment']}-{at['start']:09d}"


def checkpoint_units(checkpoints: tuple[str, ...], pieces: list[dict[str, Any]], name: str) -> list[Unit]:
    """Return one unit per checkpoint and shard, the checkpoint in the outer loop: a worker keeps its model."""
    return [
        Unit(f"{checkpoint}-{shard_key(name, p)}", p | {"set": name, "checkpoint": checkpoint})
        for checkpoint in checkpoints
        for p in pieces
    ]
