"""What a job leaves behind, in bytes: arithmetic on shapes, exact where an object's size follows from them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from storage.gradients import StoreSettings
from storage.group_sizes import group_bytes

SEGMENT_ROWS = 1 << 20  # of a segment, as ingest cuts them
_WIDTHS = {"I64": 8, "F64": 8, "F32": 4, "U8": 1}  # in the order in which the file has them


@dataclass(frozen=True)
class Size:
    """How large a job is."""

    rows: int
    tokens: int  # of all rows
    queries: int
    checkpoints: int
    shard_rows: int

    @property
    def segments(self) -> list[int]:
        """Return the rows of every segment."""
        return [min(SEGMENT_ROWS, self.rows - first) for first in range(0, self.rows, SEGMENT_ROWS)]

    @property
    def shards(self) -> list[int]:
        """Return the rows of every shard."""
        return [
            min(self.shard_rows, rows - first) for rows in self.segments for first in range(0, rows, self.shard_rows)
        ]


def safetensors_bytes(arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of a safetensors file of these arrays, by name (type, shape): exact.

    The file: eight bytes, a JSON header filled up to eight, then the arrays by type and name.
    """
    header, at, order = {}, 0, list(_WIDTHS)
    for name, (kind, shape) in sorted(arrays.items(), key=lambda one: (order.index(one[1][0]), one[0])):
        stop = at + _WIDTHS[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    return 8 + -(-len(json.dumps(header, separators=(",", ":")).encode()) // 8) * 8 + at


def gradient_bytes(settings: StoreSettings, size: Size) -> int:
    """Return the bytes of all groups of a store, without compression."""
    return size.checkpoints * sum(group_bytes(settings, rows, size.shard_rows) for rows in size.segments)


def state_bytes(arrays: Mapping[str, int], parameters: int, size: Size) -> int:
    """Return the bytes of the query states of all checkpoints: float32 arrays [Q, columns], norms and losses."""
    queries = size.queries
    found: dict[str, tuple[str, tuple[int, ...]]] = {f"arrays/{n}": ("F32", (queries, d)) for n, d in arrays.items()}
    found |= {"losses": ("F64", (queries,)), "weight": ("F64", ()), "chosen": ("I64", (parameters,))}
    return size.checkpoints * safetensors_bytes(found | {"norms": ("F32", (queries, parameters))})


def score_bytes(size: Size, top_k: int, dense: bool) -> int:
    """Return the bytes of every shard's scores, all of its rows being good."""
    total = 0
    for rows in size.shards:
        top = (2, size.queries, min(top_k, rows))
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "ids": ("I64", (rows,)), "state": ("U8", (rows,)), "totals": ("F64", (rows,)),
            "self_influence": ("F64", (rows,)), "losses": ("F64", (rows,)), "top_ids": ("I64", top), "top_scores": ("F64", top),
        }  # fmt: skip
        total += safetensors_bytes(found | ({"dense": ("F32", (rows, size.queries))} if dense else {}))
    return total


def block_bytes(size: Size) -> int:
    """Return the bytes of the score blocks that a job without a store keeps until its index stands."""
    return size.checkpoints * size.rows * (8 * size.queries + 8 + 8 + 1)
