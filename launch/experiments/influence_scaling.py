"""influence.scaling: do two actors make a solve twice as fast?

Timed are a curvature product over the examples and LiSSA's repetitions, which is what a solve spends its time on, each on
one and on two Ray actors and, beside them, on plain processes (two_actors.py). A last cell compares the bits that one, two
and three actors leave.
"""

import hashlib
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from actors.context import make_task
from actors.operator import DistributedOperator
from actors.pool import Pool
from actors.specs import CheckpointSpec, CurvatureSpec, GradientSpec, ModelSpec
from actors.states import gradients_key, save_state
from actors.units import Unit
from engine.coordinates import chosen_coordinates, top_layers
from engine.counters import derive_key, normals
from engine.memory import CPU_TOKENS
from engine.methods.contract import QueryState
from engine.models import save_checkpoint
from engine.projection import Projection
from engine.stochastic_solvers import Lissa
from engine.tasks.contract import encode, initialise
from launch.experiments.collect import ROOT, base_folder
from launch.experiments.plots import save
from launch.experiments.registry import Experiment, Gate
from launch.experiments.two_actors import Work, pool_of, scaling_gates, seconds, speed_up
from storage.checkpoints import fingerprint
from storage.corpus import ingest
from storage.locations import Location
from storage.readers import read_records

TRAIN, CHECKPOINT, LABEL = "train", "c0", "timed"
KINDS = {"products": "curvature products", "lissa": "LiSSA repetitions"}
COLOURS = {"actors": "#0b6e4f", "processes": "#888888"}
BITS = "bits"


@dataclass(frozen=True)
class Solves:
    """A run with a model and examples, and what is done on it."""

    run: str
    settings: dict[str, Any]  # of every unit
    ids: np.ndarray
    block: Tensor  # (size, k), what is multiplied
    block_rows: int
    lissa: Lissa

    def products(self) -> Work:
        """Return the units of a product."""
        starts = range(0, len(self.ids), self.block_rows)
        ends = [(first, min(first + self.block_rows, len(self.ids))) for first in starts]
        units = [Unit(f"rows-{first}", {"first": first, "last": last}) for first, last in ends]
        told = self.settings | {"ids": self.ids, "block": self.block.numpy()}
        return Work(self.run, "curvature", told, units, [])

    def repetitions(self) -> Work:
        """Return the units of all of LiSSA's repetitions."""
        keys = [f"states/{LABEL}/lissa/{t}" for t in range(self.lissa.repetitions)]
        payload = {"first": 0, "last": self.block.shape[1]}
        units = [Unit(f"repetition-{t}", payload | {"repetition": t, "key": key}) for t, key in enumerate(keys)]
        told = self.settings | {"ids": self.ids, "lissa": self.lissa, "largest": 1.0, "l2": 0.0, "label": LABEL}
        return Work(self.run, "lissa", told, units, keys)

    def work(self, kind: str) -> Work:
        return self.products() if kind == "products" else self.repetitions()


def cells(config: dict[str, Any]) -> list[str]:
    return [*KINDS, BITS]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the seconds of every arm and round of one kind of work, or the digests of what all pools leave."""
    with tempfile.TemporaryDirectory(prefix="influence-scaling-") as name:
        solves = make_solves(config, Path(name))
        if cell == BITS:
            return {kind: [bits(config, solves, kind, workers) for workers in (1, 2, 3)] for kind in KINDS}
        taken = seconds(config, solves.work(cell), partial(on_pool, solves, cell))
    return {"seconds": taken, "parameters": len(solves.block), "examples": len(solves.ids)}


def on_pool(solves: Solves, kind: str, pool: Pool) -> bytes:
    """Do the work as a solve does it and return what it leaves."""
    if kind == "products":
        operator = DistributedOperator(pool, solves.settings, len(solves.block), solves.ids, solves.block_rows)
        return operator.apply(solves.block).numpy().tobytes()
    work = solves.repetitions()
    replace(work, told=work.told | {"ids": pool.share(solves.ids)}).on_pool(pool)
    return work.taken()


def bits(config: dict[str, Any], solves: Solves, kind: str, workers: int) -> str:
    """Return a digest of what so many actors make."""
    with pool_of(config, solves.run, workers) as pool:
        return hashlib.sha256(on_pool(solves, kind, pool)).hexdigest()[:16]


def make_solves(config: dict[str, Any], folder: Path) -> Solves:
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
    return Solves(run.uri, settings, ids, block, config["block_rows"], Lissa(1.0, 1e4, **config["lissa"]))


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge the actors' speed-up against the processes', medians over the rounds, and whether all bits are the same."""
    found = [gate for kind, name in KINDS.items() for gate in scaling_gates(name, done[kind]["seconds"])]
    alike = all(len(set(digests)) == 1 for digests in done[BITS].values())
    return [*found, Gate("same bits on 1, 2 and 3 actors", float(alike), threshold=1.0)]


def plot(config: dict[str, Any], done: dict[str, dict[str, Any]], folder: str) -> None:
    """Draw every round's speed-up of actors and of processes."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    for axes, (kind, name) in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS.items(), strict=True):
        for place, (of, colour) in enumerate(COLOURS.items()):
            values = speed_up(done[kind]["seconds"], of)
            axes.plot(np.full(len(values), place), values, "o", color=colour, alpha=0.6, markersize=4)
        axes.axhline(2, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(COLOURS)), [f"two {of}" for of in COLOURS])
        axes.set_xlim(-0.5, len(COLOURS) - 0.5)
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("times as fast as one" if kind == "products" else "")
    save(figure, folder, "scaling")


EXPERIMENT = Experiment(
    name="influence.scaling",
    claim="Two actors speed up curvature products and LiSSA's repetitions as two independent processes do",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
    plot=plot,
)
