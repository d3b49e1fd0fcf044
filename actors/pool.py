"""The contract of a pool of workers, and the pool that runs in this process (tests, notebooks, toy passes).

A pool starts workers, carries units to them and says what became of them, as schedule.py's events. It decides nothing.
"""

from __future__ import annotations

import socket
import traceback
from collections import deque
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

from actors.schedule import Done, Event, Failed, Lost, Ready
from actors.units import Stage, Unit, Worker, WorkerFactory
from storage.damage import DamagedObject


class PoolError(RuntimeError):
    """The pool cannot get or start its workers."""


class Pool(Protocol):
    """Workers that live as long as the job. A context manager: leaving it closes it."""

    @property
    def size(self) -> int:
        """Return how many workers there are once all are up."""
        ...

    @property
    def device(self) -> str:
        """Return what the workers compute on: cpu or cuda."""
        ...

    @property
    def workers(self) -> list[str]:
        """Return the names of the workers that are up now."""
        ...

    def submit(self, worker: str, stage: Stage, unit: Unit) -> None:
        """Queue a unit on a worker; its units run one at a time, in order. ValueError: no such worker is up."""
        ...

    def wait(self, timeout: float) -> list[Event]:
        """Return what happened, after `timeout` seconds at the latest. A worker's Done and Failed stand before its
        Lost; what a lost worker had in flight is never heard of again. PoolError: a worker cannot start."""
        ...

    def replace(self, worker: str) -> None:
        """End a worker, lost or not, with all it has in flight, and start another under a new name."""
        ...

    def share(self, value: Any) -> Any:
        """Return what stands for a large value in a stage's settings: sent once, not with every unit; units find the
        value itself in its place, and must not change it."""
        ...

    def close(self) -> None:
        """End all workers. Nothing is submitted afterwards."""
        ...


def worker_name(slot: int, generation: int, host: str) -> str:
    """Return a name that tells where the worker runs and which replacement it is: `worker-2.1@node-3`."""
    return f"worker-{slot}.{generation}@{host}"


def attempt(name: str, worker: Worker, function: str, settings: dict[str, Any], unit: Unit) -> Done | Failed:
    """Run one unit and return what became of it; runs beside the worker, so no exception ever travels.

    An OSError may be tried again, but for an object found damaged; a ValueError or FloatingPointError is a mistake in
    config or data, said in one message; every other exception is a bug. The receipt is signed with the worker's name.
    """
    try:
        return Done(name, replace(worker.run(function, settings, unit), worker=name))
    except DamagedObject as error:  # trying again would read the same
        return Failed(name, unit.key, str(error), "mistake", traceback.format_exc())
    except OSError as error:
        return Failed(name, unit.key, f"{type(error).__name__}: {error}", "storage", traceback.format_exc())
    except (ValueError, FloatingPointError) as error:
        return Failed(name, unit.key, str(error), "mistake", traceback.format_exc())
    except Exception as error:
        return Failed(name, unit.key, f"{type(error).__name__}: {error}", "bug", traceback.format_exc())


class InProcessPool:
    """Workers in this very process and thread: `wait` runs one unit. A worker that raises SystemExit is lost."""

    def __init__(self, factory: WorkerFactory, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} is not allowed: a pool needs at least 1.")
        self._factory = factory
        self._host = socket.gethostname()
        self._places: dict[str, tuple[int, int]] = {}  # slot and generation by name
        self._alive: dict[str, Worker] = {}
        self._news: list[Event] = []
        self._queue: deque[tuple[str, Stage, Unit]] = deque()
        for slot in range(workers):
            self._start(slot, generation=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def size(self) -> int:
        return len(self._places)

    @property
    def workers(self) -> list[str]:
        return list(self._alive)

    def submit(self, worker: str, stage: Stage, unit: Unit) -> None:
        if worker not in self._alive:
            raise ValueError(f"worker {worker} is not up; these are: {', '.join(self._alive) or 'none'}.")
        self._queue.append((worker, stage, unit))

    def wait(self, timeout: float) -> list[Event]:
        if not self._news and self._queue:
            self._news.append(self._run(*self._queue.popleft()))
        news, self._news = self._news, []
        return news

    def replace(self, worker: str) -> None:
        if worker not in self._places:
            raise ValueError(f"worker {worker} does not exist; these do: {', '.join(self._places) or 'none'}.")
        self._end(worker)
        slot, generation = self._places.pop(worker)
        self._start(slot, generation + 1)

    def share(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        self._places.clear()
        self._alive.clear()
        self._queue.clear()
        self._news.clear()

    def _start(self, slot: int, generation: int) -> None:
        name = worker_name(slot, generation, self._host)
        self._places[name] = (slot, generation)
        self._alive[name] = self._factory()
        self._news.append(Ready(name))

    def _end(self, worker: str) -> None:
        self._alive.pop(worker, None)
        self._queue = deque(task for task in self._queue if task[0] != worker)

    def _run(self, worker: str, stage: Stage, unit: Unit) -> Event:
        try:
            return attempt(worker, self._alive[worker], stage.function, stage.settings, unit)
        except SystemExit as exit_:
            self._end(worker)
            return Lost(worker, f"the worker exited with status {exit_.code}")
