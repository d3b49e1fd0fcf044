"""What an earlier attempt of a unit left behind: kept if it is the same, else removed, but only by a worker that may."""

from collections.abc import Callable
from typing import Any, TypeVar

from actors.context import WorkerContext
from actors.units import Unit
from storage.locations import ObjectConflict, ObjectRecord

Written = TypeVar("Written")


def write_unit(
    context: WorkerContext,
    settings: dict[str, Any],
    unit: Unit,
    write: Callable[[], Written],
    delete: Callable[[], None],  # removes every object of the unit
) -> Written:
    """Return what `write` returns; other bytes that an attempt on another machine type left make way first.

    LeaseLost if the unit is done by now, or if another driver holds the run: this worker was then given up, and what
    is there stays.
    """
    try:
        return write()
    except ObjectConflict:
        settings["claim"].check(context.run, unit.key)
        delete()
        return write()


def put(context: WorkerContext, settings: dict[str, Any], unit: Unit, key: str, data: bytes) -> ObjectRecord:
    """Write a unit's only object and return its record."""
    run = context.run
    write_unit(context, settings, unit, lambda: run.create(key, data), lambda: run.delete(key))
    return ObjectRecord.of(key, data)
