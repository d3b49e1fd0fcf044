"""influence.scaling: do two actors make a solve twice as fast?

Timed are a curvature product over the examples and LiSSA's repetitions, which is what a solve spends its time on, each on
one and on two Ray actors: the job's own units, through the job's own loop. Beside them what the machine can give: the same
units, without Ray, by one process with one thread and by two that share them. A round times all four, in turning order; its
figure is the actors' speed-up divided by the processes'. A last cell compares the bits that one, two and three actors leave.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from actors.cluster import connect
from actors.context import make_task
from actors.operator import DistributedOperator, MemoryJournal
from actors.pool import InProcessPool, Pool
from actors.ray_pool import RayPool
from actors.run_stage import run_stage
from actors.specs import CheckpointSpec, CurvatureSpec, GradientSpec, ModelSpec
from actors.states import gradients_key, save_state
from actors.units import Stage, Unit
from actors.worker import MakeWorker, Worker
from engine.coordinates import chosen_coordinates, top_layers
from engine.counters import derive_key, normals
from engine.memory import CPU_TOKENS
from engine.methods.contract import QueryState
from engine.metrics import bootstrap_interval
from engine.models import save_checkpoint
from engine.projection import Projection
from engine.stochastic_solvers import Lissa
from engine.tasks.contract import encode, initialise
from launch.experiments.collect import ROOT, base_folder, run_round, timed, worker_process
from launch.experiments.registry import Experiment, Gate
from storage.checkpoints import fingerprint
from storage.corpus import ingest
from storage.locations import Location
from storage.readers import read_records

TRAIN, CHECKPOINT, LABEL = "train", "c0", "timed"
KINDS = {"products": "curvature products", "lissa": "LiSSA repetitions"}
COLOURS = {"actors": "#0b6e4f", "processes": "#888888"}
ASKED = 0.9
BITS = "bits"
CPUS = 8  # that Ray is told of: actors of all pools are up at once, and only those that are asked work


@dataclass(frozen=True)
class Work:
    """A run with a model and examples, and what is done on it."""

    run: str
    settings: dict[str, Any]  # of every unit
    ids: np.ndarray
    block: Tensor  # (size, k), what is multiplied
    block_rows: int
    lissa: Lissa

    def units(self, kind: str) -> list[Unit]:
        """Return the units of a product, or of all repetitions."""
        if kind == "products":
            starts = range(0, len(self.ids), self.block_rows)
            ends = [(first, min(first + self.block_rows, len(self.ids))) for first in starts]
            return [Unit(f"rows-{first}", {"first": first, "last": last}) for first, last in ends]
        columns = self.block.shape[1]
        return [
            Unit(f"repetition-{t}", {"first": 0, "last": columns, "repetition": t, "key": f"states/{LABEL}/lissa/{t}"})
            for t in range(self.lissa.repetitions)
        ]

    def told(self, kind: str) -> dict[str, Any]:
        """Return what the units are told besides their payload."""
        if kind == "products":
            return self.settings | {"ids": self.ids, "block": self.block.numpy()}
        return self.settings | {"ids": self.ids, "lissa": self.lissa, "largest": 1.0, "l2": 0.0, "label": LABEL}


def cells(config: dict[str, Any]) -> list[str]:
    return [*KINDS, BITS]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the seconds of every arm and round of one kind of work, or the digests of what all pools leave."""
    with tempfile.TemporaryDirectory(prefix="influence-scaling-") as name, ExitStack() as stack:
        work = make_work(config, Path(name))
        if cell == BITS:
            return {kind: [bits(config, work, kind, workers) for workers in (1, 2, 3)] for kind in KINDS}
        pools = [stack.enter_context(pool_of(config, work, workers)) for workers in (1, 2)]
        pair: list[ProcessPoolExecutor | None] = [None, None]
        if config["own_process"]:
            pair = [stack.enter_context(worker_process()) for _ in pair]
        arms: dict[str, Callable[[], Any]] = {
            "one actor": partial(on_pool, pools[0], work, cell),
            "two actors": partial(on_pool, pools[1], work, cell),
            "one process": partial(on_processes, pair[:1], work, cell),
            "two processes": partial(on_processes, pair, work, cell),
        }
        for arm in arms.values():
            arm()
            arm()  # by now every worker holds the model and whatever it is given of the examples
        passes: dict[str, Callable[[], float]] = {name: partial(timed, arm) for name, arm in arms.items()}
        rounds = [run_round(passes, number) for number in range(config["rounds"])]
    return {
        "seconds": {name: [round(one[name], 4) for one in rounds] for name in arms},
        "parameters": len(work.block),
        "examples": len(work.ids),
    }


@contextmanager
def pool_of(config: dict[str, Any], work: Work, workers: int) -> Iterator[Pool]:
    """Give a pool of so many actors; at toy size in this process."""
    make = MakeWorker(work.run, "cpu")
    if not config["own_process"]:
        with InProcessPool(make, workers) as pool:
            yield pool
        return
    connect("local", num_cpus=CPUS)
    with RayPool(make, workers) as ray_pool:
        yield ray_pool


def on_pool(pool: Pool, work: Work, kind: str) -> bytes:
    """Do the work as a solve does it and return what it leaves."""
    if kind == "products":
        operator = DistributedOperator(pool, work.settings, len(work.block), work.ids, work.block_rows)
        return operator.apply(work.block).numpy().tobytes()
    told = work.told(kind)
    run_stage(pool, Stage("lissa", "lissa", told | {"ids": pool.share(work.ids)}, work.units(kind)), MemoryJournal())
    return left_behind(work)


def on_processes(processes: list[ProcessPoolExecutor | None], work: Work, kind: str) -> None:
    """Do the same units without Ray, each process its share of them, one after another."""
    units, told = work.units(kind), work.told(kind)
    shares = [units[place :: len(processes)] for place in range(len(processes))]
    pairs = list(zip(processes, shares, strict=True))
    waiting = [process.submit(do_units, work.run, kind, told, share) for process, share in pairs if process]
    for process, share in pairs:
        if process is None:
            do_units(work.run, kind, told, share)
    for one in waiting:
        one.result()
    if kind == "lissa":
        left_behind(work)


def do_units(run: str, kind: str, told: dict[str, Any], units: list[Unit]) -> None:
    """Do some units in this process; partial products are added up here."""
    total, function = 0.0, "curvature" if kind == "products" else kind
    for unit in units:
        value = held_worker(run).run(function, told, unit).value
        total = total if value is None else total + value


@lru_cache(maxsize=1)
def held_worker(run: str) -> Worker:
    return Worker(run, "cpu")


def left_behind(work: Work) -> bytes:
    """Return all repetitions, and remove them for the next time."""
    run, keys = Location.parse(work.run), [unit.payload["key"] for unit in work.units("lissa")]
    found = b"".join(run.read(key) for key in keys)
    for key in keys:
        run.delete(key)
    return found


def bits(config: dict[str, Any], work: Work, kind: str, workers: int) -> str:
    """Return a digest of what so many actors make."""
    with pool_of(config, work, workers) as pool:
        return hashlib.sha256(on_pool(pool, work, kind)).hexdigest()[:16]


def make_work(config: dict[str, Any], folder: Path) -> Work:
    """Build checkpoint and corpus, and random right-hand sides in the place of queries' gradients."""
    base = base_folder(config["model"], folder)
    spec = ModelSpec("text-classification", config["task_settings"], (), "float32", "sdpa")
    task = make_task(spec, base, folder / "cache")
    torch.manual_seed(0)
    network = initialise(task, base)
    save_checkpoint(network, folder / CHECKPOINT)
    checkpoint = CheckpointSpec(CHECKPOINT, str(folder / CHECKPOINT), 0, 1.0, fingerprint(folder / CHECKPOINT))
    model = ModelSpec(spec.task, spec.task_settings, (checkpoint,), spec.compute, spec.attention)
    run = Location.parse(str(folder / "run"))
    records = islice(read_records(str(ROOT / config["corpus"])), config["rows"])
    ingest(run, TRAIN, records, lambda record: encode(task, record))
    chosen = chosen_coordinates(network, top_layers(network, config["top_layers"]))
    drawn = normals(derive_key(0, "right-hand sides"), 0, chosen.size * config["columns"])
    block = torch.from_numpy(drawn).view(chosen.size, config["columns"])
    arrays = {name: part.float().contiguous() for name, part in chosen.split(block).items()}
    state = QueryState(arrays, None, torch.zeros(config["columns"], dtype=torch.float64), 1.0, (0,))
    run.create(gradients_key(LABEL, CHECKPOINT), save_state(state))
    names = tuple(weight.name for weight in chosen.weights)
    settings = {
        "model": model,
        "gradients": GradientSpec(names, Projection("none"), False, CPU_TOKENS),
        "curvature": CurvatureSpec(CHECKPOINT, "gauss-newton", "float32", TRAIN, None),
    }
    ids = np.arange(config["rows"], dtype=np.int64)
    return Work(run.uri, settings, ids, block, config["block_rows"], Lissa(1.0, 1e4, **config["lissa"]))


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the actors' speed-up against the processes', medians over the rounds, and whether all bits are the same."""
    found = []
    for kind, name in KINDS.items():
        actors, processes = (speed_up(done[kind], of) for of in COLOURS)
        found += [
            median(f"{name}: scaling of actors / of processes", actors / processes, ASKED),
            median(f"{name}: two actors / one", actors),
            median(f"{name}: two processes / one", processes),
        ]
    alike = all(len(set(digests)) == 1 for digests in done[BITS].values())
    return [*found, Gate("same bits on 1, 2 and 3 actors", float(alike), threshold=1.0)]


def speed_up(result: dict[str, Any], of: str) -> np.ndarray:
    """Return every round's seconds of one divided by those of two."""
    one, two = (np.array(result["seconds"][name]) for name in ONE_AND_TWO[of])
    return one / two


ONE_AND_TWO = {"actors": ("one actor", "two actors"), "processes": ("one process", "two processes")}


def median(name: str, values: np.ndarray, asked: float | None = None) -> Gate:
    return Gate(name, float(np.median(values)), bootstrap_interval(values, statistic=np.median), asked, timed=True)


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw every round's speed-up of actors and of processes."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    for axes, (kind, name) in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS.items(), strict=True):
        for place, (of, colour) in enumerate(COLOURS.items()):
            values = speed_up(done[kind], of)
            axes.plot(np.full(len(values), place), values, "o", color=colour, alpha=0.6, markersize=4)
        axes.axhline(2, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(COLOURS)), [f"two {of}" for of in COLOURS])
        axes.set_xlim(-0.5, len(COLOURS) - 0.5)
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("times as fast as one" if kind == "products" else "")
    for kind in ("png", "svg"):
        figure.savefig(Path(folder) / f"scaling.{kind}", dpi=100)


EXPERIMENT = Experiment(
    name="influence.scaling",
    claim="Two actors speed up curvature products and LiSSA's repetitions as two independent processes do",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
