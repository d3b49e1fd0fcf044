"""Units of work, the stages they form, and the receipts that come back. Plain records that pickle.

What a unit computes is the worker's business (a table of unit functions); which unit runs next is schedule.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol


@dataclass(frozen=True)
class Unit:
    """One piece of work: seconds to a minute, idempotent, and only its payload says what to do."""

    key: str  # unique in its stage; names its folder in the journal
    payload: dict[str, Any] = field(default_factory=dict)  # small and picklable: ids and ranges, never arrays

    def label(self) -> str:
        """Return the key, with its rows where the payload has `start` and `stop`: `c0/41 (rows 10496:10752)`."""
        if "start" in self.payload and "stop" in self.payload:
            return f"{self.key} (rows {self.payload['start']}:{self.payload['stop']})"
        return self.key


@dataclass(frozen=True)
class Stage:
    """A list of units that one unit function carries out under the same settings, in order of preference."""

    name: str
    function: str  # key in the worker's table of unit functions
    settings: dict[str, Any]  # travels with every unit: small
    units: list[Unit]

    def __post_init__(self) -> None:
        keys = [unit.key for unit in self.units]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"stage {self.name} has two units named {twice!r}: keys must be unique in a stage.")


@dataclass(frozen=True)
class Receipt:
    """What a worker sends back for a unit; as a dict it is the done-record of a finished one."""

    unit: str  # the unit's key
    rows: int = 0  # rows looked at, quarantined ones included
    tokens: int = 0
    bytes: int = 0  # written to storage
    seconds: float = 0.0
    peak_memory: int = 0  # bytes, of the worker's process
    quarantined: dict[int, str] = field(default_factory=dict)  # rows that were not finite: id, and where
    objects: list[dict[str, Any]] = field(default_factory=list)  # key, size and checksum of everything written
    worker: str = ""  # filled in by the pool
    unfinished: str = ""  # how far it is, in words: its state is saved, it is handed out again, nothing is committed
    value: Any = None  # a partial sum for the driver alone, never part of the done-record

    def record(self) -> dict[str, Any]:
        """Return the done-record: the receipt as JSON-ready values."""
        record = asdict(replace(self, value=None))
        del record["value"], record["unfinished"]
        return record | {"quarantined": {str(row): where for row, where in self.quarantined.items()}}


class Worker(Protocol):
    """What a pool runs: made by a factory in the worker's own process, kept for the whole job."""

    def run(self, function: str, settings: dict[str, Any], unit: Unit) -> Receipt:
        """Carry out one unit. OSError: may succeed elsewhere or later; anything else: a bug, the stage stops."""
        ...


WorkerFactory = Callable[[], Worker]  # picklable; must be quick: a worker loads its model with its first unit
