"""The pool of Ray actors: one long-lived actor a worker, no retries by Ray, two units at most under way on each.

Ray gives at-least-once with concurrent duplicates (a cut-off actor goes on writing for seconds): that a unit may run
twice is the store's business, that it is committed once is schedule.py's.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.pool import PoolError, attempt, worker_name
from actors.schedule import Event, Failed, Lost, Ready
from actors.units import Stage, Unit, Worker, WorkerFactory

logger = logging.getLogger(__name__)

START_TIMEOUT = 60.0  # seconds that a worker may stay pending
NODE_TIMEOUT = 900.0  # the same where the cluster may grow: a node has to boot and to fetch its image


class _Actor:
    """What runs in the actor's process: makes the worker, says where it is, passes units on."""

    def start(self, factory: WorkerFactory) -> tuple[str, str]:
        self.worker: Worker = factory()
        return socket.gethostname(), ray.get_runtime_context().get_node_id()

    def run(self, name: str, function: str, settings: dict[str, Any], unit: Unit) -> Event:
        found = {k: ray.get(v) if isinstance(v, ray.ObjectRef) else v for k, v in settings.items()}  # shared ones
        return attempt(name, self.worker, function, found, unit)


@dataclass
class _Slot:
    """One worker's place. Its name is known once the actor runs somewhere; a lost one keeps it until replaced."""

    number: int
    generation: int
    actor: Any
    starting: Any  # reference to start()'s answer; None once it came
    since: float  # when the slot began to wait for an actor
    name: str = ""
    node: str = ""
    lost: bool = False
    warned: bool = False
    tasks: dict[Any, Unit] = field(default_factory=dict)  # by reference, oldest first


class RayPool:
    """Ray actors as workers. Needs a connected Ray (cluster.connect).

    With `most` above `workers` the others are asked for as well, and come when the cluster has room for them.
    """

    def __init__(
        self,
        factory: WorkerFactory,
        workers: int,
        cpus: float = 1.0,  # per worker; also its threads on a GPU worker
        gpus: float = 0.0,  # per worker
        most: int | None = None,  # workers; None: no more than `workers`
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} is not allowed: a pool needs at least 1.")
        if not ray.is_initialized():
            raise ValueError("Ray is not connected: call actors.cluster.connect() before making a RayPool.")
        self._factory = ray.put(factory)
        self._least, most = workers, max(workers, most or 0)
        self._patience = NODE_TIMEOUT if most > workers else START_TIMEOUT
        self._resources = {"CPU": cpus, "GPU": gpus}
        self._actor_class = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # the unit that computes, and one that reads or writes (Worker keeps the turns)
            runtime_env={"env_vars": worker_environment(cpus, gpus)},
        )(_Actor)
        self._clock = clock
        self._last_ready = clock()
        self._slots = [self._start(number, 0, self._last_ready) for number in range(most)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def device(self) -> str:
        return "cuda" if self._resources["GPU"] else "cpu"

    @property
    def size(self) -> int:
        return self._least

    @property
    def workers(self) -> list[str]:
        return [slot.name for slot in self._slots if slot.name and not slot.lost]

    def submit(self, worker: str, stage: Stage, unit: Unit) -> None:
        if worker not in self.workers:
            raise ValueError(f"worker {worker} is not up; these are: {', '.join(self.workers) or 'none'}.")
        slot = self._slot(worker)
        slot.tasks[slot.actor.run.remote(worker, stage.function, stage.settings, unit)] = unit

    def wait(self, timeout: float) -> list[Event]:
        starting = [slot.starting for slot in self._slots if slot.starting is not None]
        references = starting + [reference for slot in self._slots for reference in slot.tasks]
        if not references:
            return []
        ray.wait(references, num_returns=1, timeout=timeout)
        answered = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
        events = [event for slot in self._slots for event in self._collect(slot, answered)]
        self._check_pending()
        return events

    def replace(self, worker: str) -> None:
        slot = self._slot(worker)
        ray.kill(slot.actor, no_restart=True)
        self._slots[slot.number] = self._start(slot.number, slot.generation + 1, self._clock())

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def close(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor, no_restart=True)
        self._slots = []

    def _slot(self, worker: str) -> _Slot:
        for slot in self._slots:
            if slot.name == worker:
                return slot
        raise ValueError(f"worker {worker} does not exist; these do: {', '.join(self.workers) or 'none'}.")

    def _start(self, number: int, generation: int, since: float) -> _Slot:
        actor = self._actor_class.remote()
        return _Slot(number, generation, actor, actor.start.remote(self._factory), since)

    def _collect(self, slot: _Slot, answered: set[Any]) -> list[Event]:
        """Return the events behind one worker's answers, oldest first."""
        if slot.starting in answered:
            return self._collect_start(slot)
        events: list[Event] = []
        for reference, unit in list(slot.tasks.items()):
            if reference not in answered:
                continue
            try:
                events.append(ray.get(reference))
            except RayTaskError as error:  # not the unit's own error, which comes as Failed: what cannot be sent
                events.append(Failed(slot.name, unit.key, last_line(error), "bug", str(error)))
            except RayError as error:
                slot.lost = True
                slot.tasks.clear()
                return [*events, Lost(slot.name, first_line(error), lost_with_node(error, slot.node))]
            del slot.tasks[reference]
        return events

    def _collect_start(self, slot: _Slot) -> list[Event]:
        try:
            host, slot.node = ray.get(slot.starting)
        except RayTaskError as error:
            raise PoolError(f"worker {slot.number} could not start: {last_line(error)}") from error
        except RayActorError:  # gone before it ran anything: the slot goes on waiting for an actor
            self._slots[slot.number] = self._start(slot.number, slot.generation, slot.since)
            return []
        except RayError as error:  # its environment cannot be made, or no node will ever have the resources
            raise PoolError(f"worker {slot.number} could not start: {first_line(error)}") from error
        slot.starting = None
        slot.name = worker_name(slot.number, slot.generation, host)
        self._last_ready = self._clock()
        return [Ready(slot.name)]

    def _check_pending(self) -> None:
        """Raise PoolError if too few workers come up, but do without a replacement while other workers go on."""
        if len(self.workers) >= self._least:
            return
        for slot in self._slots:
            waited = self._clock() - max(slot.since, self._last_ready)
            if slot.starting is None or waited <= self._patience:
                continue
            message = pending_message(slot.number, self.size, waited, self._resources)
            if slot.generation == 0 or not self.workers:
                raise PoolError(message)
            if not slot.warned:
                slot.warned = True
                logger.warning("%s Going on with %d of %d workers.", message, len(self.workers), self.size)


def worker_environment(cpus: float, gpus: float) -> dict[str, str]:
    """Return the environment of a worker's process.

    A CPU worker has one thread, whatever its share of a CPU, so that results do not depend on the machine. The
    allocator keeps freed memory: giving large buffers back after every batch costs page faults in the next.
    """
    if gpus:
        return {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false"}
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **dict.fromkeys(threads, "1"),
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
        "THP_MEM_ALLOC_ENABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def lost_with_node(error: RayError, node: str) -> bool:
    """Return whether the whole node went (lost, cut off or pre-empted), rather than the worker's process alone.

    Ray itself takes up to half a minute to call a node dead, so the node's own port is asked too.
    """
    if getattr(error, "preempted", False) or "node has died" in str(error):
        return True
    return not any(entry["Alive"] and answers(entry) for entry in ray.nodes() if entry["NodeID"] == node)


def answers(node: Mapping[str, Any], timeout: float = 2.0) -> bool:
    """Return whether a node's Ray daemon accepts a connection within `timeout` seconds."""
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout):
            return True
    except OSError:
        return False


def pending_message(number: int, size: int, waited: float, asked: Mapping[str, float]) -> str:
    """Return what a worker waits for and what the cluster has, in one sentence each."""
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in asked.items() if amount)
    total, free = ray.cluster_resources(), ray.available_resources()
    has = ", ".join(f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in asked)
    return (
        f"worker {number} of {size} is still pending after {waited:.0f} s. Each worker asks for {wanted}; "
        f"the cluster has {has}. Ask for fewer workers (cluster.workers) or add nodes."
    )


def last_line(error: RayTaskError) -> str:
    """Return the exception that a remote traceback ends with."""
    return str(error).strip().splitlines()[-1]


def first_line(error: BaseException) -> str:
    """Return the error's class and the first line of its text: Ray's texts run to a page."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
