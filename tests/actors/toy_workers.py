"""Toy workers and a journal in memory, for the tests of pools and stages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from actors.units import Receipt, Stage, Unit


def double(settings: dict[str, Any], unit: Unit) -> Receipt:
    """The unit that always works: says back what it was told."""
    answer = {"value": settings["factor"] * unit.payload["value"], "pid": os.getpid(), **read_environment()}
    return Receipt(unit.key, rows=10, tokens=30, bytes=400, seconds=0.1, peak_memory=1000, objects=[answer])


def read_environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")}


def fail_at_first(settings: dict[str, Any], unit: Unit) -> Receipt:
    if count_up(unit) <= unit.payload.get("failures", 0):
        raise OSError("SlowDown")
    return double(settings, unit)


def die_at_first(settings: dict[str, Any], unit: Unit) -> Receipt:
    if count_up(unit) <= unit.payload.get("deaths", 0):
        os._exit(7)
    return double(settings, unit)


def exit_at_first(settings: dict[str, Any], unit: Unit) -> Receipt:
    if count_up(unit) <= unit.payload.get("deaths", 0):
        raise SystemExit(7)
    return double(settings, unit)


def refuse(settings: dict[str, Any], unit: Unit) -> Receipt:
    raise ValueError("method.damping=-0.1 is not allowed")


def break_down(settings: dict[str, Any], unit: Unit) -> Receipt:
    raise KeyError("no such module")


class OwnError(OSError):
    """An error that does not survive pickling."""

    def __init__(self, location: str, *, size: int) -> None:
        super().__init__(f"{location} has {size} bytes")


def raise_own_error(settings: dict[str, Any], unit: Unit) -> Receipt:
    raise OwnError("s3://b/c", size=3)


def nap(settings: dict[str, Any], unit: Unit) -> Receipt:
    Path(unit.payload["tally"]).with_suffix(".begun").touch()
    time.sleep(unit.payload.get("seconds", 60) if count_up(unit) == 1 else 0)
    return double(settings, unit)


def count_up(unit: Unit) -> int:
    """Return how often this unit was started, this time included, over all processes."""
    tally = Path(unit.payload["tally"])
    with tally.open("a") as file:
        file.write("x")
    return len(tally.read_text())


FUNCTIONS = {
    function.__name__: function
    for function in (double, fail_at_first, die_at_first, exit_at_first, refuse, break_down, raise_own_error, nap)
}


class ToyWorker:
    def run(self, function: str, settings: dict[str, Any], unit: Unit) -> Receipt:
        return FUNCTIONS[function](settings, unit)


class BrokenWorker:
    def __init__(self) -> None:
        raise ValueError("no such device")


def toy_stage(function: str, folder: Path, units: int = 6, **payload: Any) -> Stage:
    """Return a stage of `units` units u0, u1, …; the payload is u1's alone."""
    made = [Unit(f"u{n}", {"value": n, "tally": str(folder / f"u{n}")}) for n in range(units)]
    made[1].payload.update(payload)
    return Stage("toy", function, {"factor": 2}, made)


class MemoryJournal:
    """Done-records in a dict; a second commit of a unit is an error, as in storage."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}

    def done(self) -> dict[str, dict[str, Any]]:
        return dict(self.records)

    def commit(self, unit_key: str, record: dict[str, Any]) -> None:
        assert unit_key not in self.records, f"{unit_key} was committed twice"
        self.records[unit_key] = record

    def missing(self, unit_keys: list[str]) -> list[str]:
        return [key for key in unit_keys if key not in self.records]
