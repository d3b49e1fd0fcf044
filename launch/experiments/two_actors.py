"""How much faster are two Ray actors than one, beside what two processes of their own gain on the same machine?

Timed are a job's own units, through the job's own loop, on one and on two actors; and the same units, without Ray, done by
one process with one thread and by two that share them. A round times all four, in turning order; its figure is the actors'
speed-up divided by the processes'.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from actors.cluster import connect
from actors.operator import MemoryJournal
from actors.pool import InProcessPool, Pool
from actors.ray_pool import RayPool
from actors.run_stage import run_stage
from actors.units import Stage, Unit
from actors.worker import MakeWorker, Worker
from launch.experiments.collect import median, run_round, timed, worker_process
from launch.experiments.registry import Gate
from storage.locations import Location

ONE_AND_TWO = {"actors": ("one actor", "two actors"), "processes": ("one process", "two processes")}
ASKED = 0.9
CPUS = 8  # that Ray is told of: actors of all pools are up at once, and only those that are asked work


@dataclass(frozen=True)
class Work:
    """Units of one function of the worker, on one run."""

    run: str
    function: str
    told: dict[str, Any]  # what the units are told besides their payload
    units: list[Unit]
    left: list[str]  # objects that the units leave

    def on_pool(self, pool: Pool) -> None:
        run_stage(pool, Stage(self.function, self.function, self.told, self.units), MemoryJournal())

    def taken(self) -> bytes:
        """Return what the units left, and remove it for the next time."""
        run = Location.parse(self.run)
        found = b"".join(run.read(key) for key in self.left)
        for key in self.left:
            run.delete(key)
        return found


def seconds(config: dict[str, Any], work: Work, on_pool: Callable[[Pool], Any]) -> dict[str, list[float]]:
    """Return the seconds of every arm in every round; `on_pool` does the units on a pool and leaves nothing behind."""
    with ExitStack() as stack:
        pools = [stack.enter_context(pool_of(config, work.run, workers)) for workers in (1, 2)]
        pair: list[ProcessPoolExecutor | None] = [None, None]
        if config["own_process"]:
            pair = [stack.enter_context(worker_process()) for _ in pair]
        arms: dict[str, Callable[[], Any]] = {
            "one actor": partial(on_pool, pools[0]),
            "two actors": partial(on_pool, pools[1]),
            "one process": partial(on_processes, pair[:1], work),
            "two processes": partial(on_processes, pair, work),
        }
        for arm in arms.values():
            arm()
            arm()  # by now every worker holds the model and whatever it is given of the examples
        passes: dict[str, Callable[[], float]] = {name: partial(timed, arm) for name, arm in arms.items()}
        rounds = [run_round(passes, number) for number in range(config["rounds"])]
    return {name: [round(one[name], 4) for one in rounds] for name in arms}


@contextmanager
def pool_of(config: dict[str, Any], run: str, workers: int) -> Iterator[Pool]:
    """Give a pool of so many actors; at toy size in this process."""
    make = MakeWorker(run, "cpu")
    if not config["own_process"]:
        with InProcessPool(make, workers) as pool:
            yield pool
        return
    connect("local", num_cpus=CPUS)
    with RayPool(make, workers) as ray_pool:
        yield ray_pool


def on_processes(processes: list[ProcessPoolExecutor | None], work: Work) -> None:
    """Do the units without Ray, each process its share of them, one after another."""
    shares = [work.units[place :: len(processes)] for place in range(len(processes))]
    pairs = list(zip(processes, shares, strict=True))
    waiting = [process.submit(do_units, work, share) for process, share in pairs if process]
    for process, share in pairs:
        if process is None:
            do_units(work, share)
    for one in waiting:
        one.result()
    work.taken()


def do_units(work: Work, units: list[Unit]) -> None:
    """Do some units in this process; partial products are added up here."""
    total = 0.0
    for unit in units:
        value = held_worker(work.run).run(work.function, work.told, unit).value
        total = total if value is None else total + value


@lru_cache(maxsize=1)
def held_worker(run: str) -> Worker:
    return Worker(run, "cpu")


def scaling_gates(name: str, result: dict[str, list[float]]) -> list[Gate]:
    """Judge the actors' speed-up against the processes', medians over the rounds, and report both."""
    actors, processes = (speed_up(result, of) for of in ONE_AND_TWO)
    return [
        median(f"{name}: scaling of actors / of processes", actors / processes, ASKED),
        median(f"{name}: two actors / one", actors),
        median(f"{name}: two processes / one", processes),
    ]


def speed_up(result: dict[str, list[float]], of: str) -> np.ndarray:
    """Return every round's seconds of one divided by those of two."""
    one, two = (np.array(result[name]) for name in ONE_AND_TWO[of])
    return one / two
