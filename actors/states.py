"""A method's query state as a file: what `prepare` saves once and every worker reads, all of it or some queries at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engine.methods.contract import QueryState
from storage.damage import read_checked, refuse_damaged
from storage.journal import Journal
from storage.locations import Location

_ARRAYS = "arrays/"  # before the name of an array in the file
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def state_key(label: str, checkpoint: str) -> str:
    return f"states/{label}/{checkpoint}.safetensors"


def gradients_key(label: str, checkpoint: str) -> str:
    """Return where the queries' gradients lie of a method that multiplies them before they are scored."""
    return f"states/{label}/gradients/{checkpoint}.safetensors"


def unfinished_key(label: str) -> str:
    """Return under what units of a solve keep their states while they are at work."""
    return f"states/{label}/unfinished"


def head_key(label: str) -> str:
    """Return where the last layer lies that was trained again for these scores."""
    return f"states/{label}/head.safetensors"


def head_figures_key(label: str) -> str:
    return f"states/{label}/head.json"


def save_state(state: QueryState) -> bytes:
    """Return the state as safetensors: the same bytes for the same state (no metadata, whose order is not fixed)."""
    tensors = {f"{_ARRAYS}{name}": array.contiguous() for name, array in state.arrays.items()}
    tensors |= {"losses": state.losses, "weight": torch.tensor(state.weight, dtype=torch.float64)}
    tensors |= {"chosen": torch.tensor(state.chosen, dtype=torch.int64)}
    for name in ("norms", "candidates", "probes"):
        value = getattr(state, name)
        if value is not None:
            tensors[name] = value.contiguous()
    return safetensors.torch.save(tensors)


def load_state(run: Location, label: str, checkpoint: str) -> QueryState:
    """Return the saved state of one checkpoint, as scoring takes it. Raises DamagedObject."""
    return parse_state(read_checked(run, *_written(run, label, checkpoint)))


def open_state(
    run: Location,
    label: str,
    checkpoint: str,
    most: int,  # bytes
) -> "QueryState | SavedState":
    """Return the saved state of one checkpoint, left on disk if it is larger than `most`. Raises DamagedObject."""
    stage, unit, key = _written(run, label, checkpoint)
    if run.exists(key) and run.size(key) > most:
        refuse_damaged(run, stage, unit, key)
        return SavedState.open(run, key)
    return load_state(run, label, checkpoint)


def _written(run: Location, label: str, checkpoint: str) -> tuple[str, str, str]:
    """Return stage, unit and key of a state: the solve's, where there is one, else its checkpoint's `prepare`."""
    solve = Journal(run, f"solve-{label}")
    if solve.record("state") or solve.is_damaged("state"):
        return f"solve-{label}", "state", state_key(label, checkpoint)
    return f"prepare-{label}", checkpoint, state_key(label, checkpoint)


def parse_state(data: bytes) -> QueryState:
    return _state(safetensors.torch.load(data))


def _state(tensors: dict[str, Tensor]) -> QueryState:
    return QueryState(
        {name.removeprefix(_ARRAYS): array for name, array in tensors.items() if name.startswith(_ARRAYS)},
        tensors.get("norms"),
        tensors["losses"],
        float(tensors["weight"]),
        tuple(tensors["chosen"].tolist()),
        tensors.get("candidates"),
        tensors.get("probes"),
    )


@dataclass(frozen=True)
class SavedState:
    """A state on disk, whose arrays are read for a window of queries at a time."""

    run: Location
    key: str
    begin: int  # of the tensors, behind the file's header
    header: dict[str, Any]  # dtype, shape and data_offsets by name
    rest: QueryState  # all but the arrays

    @classmethod
    def open(cls, run: Location, key: str) -> "SavedState":
        """Read the header (safetensors: its length as uint64, then JSON) and what is small."""
        length = int.from_bytes(run.read_range(key, 0, 8), "little")
        header = json.loads(run.read_range(key, 8, 8 + length))
        header.pop("__metadata__", None)
        found = cls(run, key, 8 + length, header, QueryState({}, None, torch.zeros(0), 1.0, ()))
        small = {name: found._read(name) for name in header if not name.startswith(_ARRAYS)}
        return cls(run, key, 8 + length, header, _state(small))

    @property
    def nbytes(self) -> int:
        """Return the bytes that are held."""
        return self.rest.nbytes

    @property
    def query_bytes(self) -> int:
        """Return the bytes of one query's arrays."""
        arrays = [self.header[name]["data_offsets"] for name in self.header if name.startswith(_ARRAYS)]
        return sum(stop - start for start, stop in arrays) // max(1, len(self.rest.losses))

    def window(self, first: int, last: int) -> QueryState:
        """Return the state of queries first … last − 1, read now; candidates and probes remain those of all."""
        tensors = {name: self._read(name, first, last) for name in self.header if name.startswith(_ARRAYS)}
        norms = None if self.rest.norms is None else self.rest.norms[first:last]
        arrays = {name.removeprefix(_ARRAYS): array for name, array in tensors.items()}
        return replace(self.rest, arrays=arrays, norms=norms, losses=self.rest.losses[first:last])

    def _read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return lines first … last − 1 of a tensor, or all of it."""
        about = self.header[name]
        start, stop = about["data_offsets"]
        shape, dtype = about["shape"], _DTYPES[about["dtype"]]
        if last is not None:
            line = (stop - start) // shape[0]
            start, stop, shape = start + first * line, start + last * line, [last - first, *shape[1:]]
        data = bytearray(self.run.read_range(self.key, self.begin + start, self.begin + stop))
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def in_windows(state: QueryState | SavedState, most: int) -> Iterator[QueryState]:
    """Yield the state, one on disk in windows of consecutive queries of at most `most` bytes, at least one query each."""
    if isinstance(state, QueryState):
        yield state
        return
    size, queries = max(1, most // state.query_bytes), len(state.rest.losses)
    for first in range(0, queries, size):
        yield state.window(first, min(first + size, queries))
