"""collect: what collection costs beside the least that any implementation must do.

One process, one thread. Collection is the job's own unit: read rows of an ingested corpus, forward, activation-only
backward, 16 × 16 projection, write to the store. The floor is plain code on the same checkpoint and rows: forward and
activation-only backward down to the same modules, batches already in memory, under the token budget that suits it best,
chosen in a separate pass. A cell is one model; its rounds time the floor, collection without and collection with exact
norms one after the other, in turning order, so that each round gives a pair of each.
"""

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from actors.collect import collect_unit
from actors.context import WorkerContext, make_task
from actors.plan import checkpoint_units, shard_rows, shards
from actors.ray_pool import worker_environment
from actors.specs import CheckpointSpec, GradientSpec, ModelSpec
from actors.units import Unit
from engine.batches import Batch, plan_batches
from engine.counters import derive_key, words
from engine.metrics import bootstrap_interval
from engine.models import ready_for_scoring, save_checkpoint
from engine.parameters import Parameter, select_parameters
from engine.projection import Projection, row_layout
from engine.tasks.contract import Task, encode, initialise
from launch.config import GradientsSection
from launch.experiments.registry import Experiment, Gate
from storage.checkpoints import fingerprint
from storage.corpus import Corpus, ingest
from storage.gradients import GradientStore, StoreSettings
from storage.locations import Location
from storage.readers import read_records
from storage.segments import Record

ROOT = Path(__file__).resolve().parents[2]
TRAIN, CHECKPOINT = "train", "c0"
NORMS = {"norms off": False, "norms on": True}


@dataclass(frozen=True)
class Setup:
    """One model with its ingested corpus, and the rows that are timed."""

    home: Path  # holds the corpus
    spec: ModelSpec
    task: Task
    parameters: list[Parameter]
    shard_rows: int
    units: list[Unit]  # timed
    rows: list[dict]  # of these units


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["models"])


def run_model(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Time one model, at full size in a process of its own that has the environment of a worker."""
    if not config["own_process"]:
        return measure(config, cell)
    with worker_process() as process:
        return process.submit(measure, config, cell).result()


@contextmanager
def worker_process() -> Iterator[ProcessPoolExecutor]:
    """Give a fresh process with a worker's environment: the allocator reads its settings when a process starts."""
    before = dict(os.environ)
    os.environ.update(worker_environment(1, 0))
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the seconds of every pass: of the floor by token budget, then of all rounds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        setup = make_setup(config["models"][cell], Path(name))
        model = floor_model(setup)
        choice = {
            budget: min(timed(partial(floor, setup, model, batches)) for _ in range(config["choice_repeats"]))
            for budget, batches in ((b, batches_of(setup, b)) for b in config["floor_budgets"])
        }
        best = min(choice, key=lambda budget: choice[budget])
        passes: dict[str, Callable[[], float]] = {"floor": partial(time_floor, setup, model, best)}
        for label, norms in NORMS.items():
            passes[label] = partial(time_collection, *collection(setup, Path(name) / label, norms))
        for one in passes.values():
            one()  # loads checkpoint and projections, warms up
        rounds = [run_round(passes, number) for number in range(config["rounds"])]
    tokens = sum(row["length"] for row in setup.rows)
    return {
        "examples": len(setup.rows),
        "tokens": int(tokens),
        "modules": len(setup.parameters),
        "floor_budget": best,
        "floor_seconds_by_budget": {str(budget): seconds for budget, seconds in choice.items()},
        "seconds": {label: [one[label] for one in rounds] for label in passes},
    }


def run_round(passes: dict[str, Callable[[], float]], number: int) -> dict[str, float]:
    """Time every pass once, each round beginning with another one: a drift of the machine hits all alike."""
    labels = list(passes)
    turn = number % len(labels)
    return {label: passes[label]() for label in labels[turn:] + labels[:turn]}


def timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def make_setup(model: dict[str, Any], folder: Path) -> Setup:
    """Build the checkpoint, ingest the corpus and cut it into shards as the job does."""
    base = base_folder(model, folder)
    spec = ModelSpec(model["task"], model["task_settings"], (), "float32", "sdpa")
    task = make_task(spec, base, folder / "cache")
    torch.manual_seed(0)
    network = initialise(task, base)
    save_checkpoint(network, folder / CHECKPOINT)
    checkpoint = CheckpointSpec(CHECKPOINT, str(folder / CHECKPOINT), 0, 1.0, fingerprint(folder / CHECKPOINT))
    spec = ModelSpec(spec.task, spec.task_settings, (checkpoint,), spec.compute, spec.attention)
    home = Location.parse(str(folder / "corpus-home"))
    ingest(home, TRAIN, records(model), lambda record: encode(task, record))
    corpus = Corpus.open(home, TRAIN)
    parameters = [p for p in select_parameters(network, model["modules"]) if not p.is_vector]
    columns = sum(row_layout(parameters, Projection()).arrays.values())
    length = shard_rows(corpus, sum(w.numel() for w in network.parameters()), columns, 2)
    pieces = shards(corpus, length)[: model["timed_shards"]]
    rows = [row for p in pieces for row in corpus.read(corpus.segments[0], p["start"], p["stop"])]
    corpus.close()
    units = checkpoint_units((CHECKPOINT,), pieces, TRAIN)
    return Setup(folder / "corpus-home", spec, task, parameters, length, units, rows)


def base_folder(model: dict[str, Any], folder: Path) -> Path:
    """Return what the model starts from: pretrained weights, or a shape alone."""
    if "base" in model:
        return Location.parse(model["base"]).fetch(folder / "cache")
    AutoConfig.for_model(**model["shape"]).save_pretrained(folder / "base")
    return folder / "base"


def records(model: dict[str, Any]) -> Iterator[Record]:
    """Yield the corpus: a file's records, or random tokens."""
    if "corpus" in model:
        yield from islice(read_records(str(ROOT / model["corpus"])), model["rows"])
        return
    drawn = model["random"]
    for row in range(model["rows"]):
        # u^1.6 of a uniform u has mean 1 / 2.6: lengths 2 to 128 come to 51 on average
        share = (int(words(derive_key(0, "lengths"), row, 1)[0]) / 2**64) ** 1.6
        length = 2 + int(share * (drawn["longest"] - 1))
        tokens = words(derive_key(0, "tokens", row), 0, length) % drawn["vocabulary"]
        yield {"input_ids": tokens.astype(np.int64)}, f"random row {row}"


def floor_model(setup: Setup) -> nn.Module:
    """Return the checkpoint, frozen, with its graph started at the outputs of the lowest of the chosen modules."""
    model = setup.task.build(Path(setup.spec.checkpoints[0].uri))
    model = ready_for_scoring(model, torch.device("cpu"), torch.float32)
    modules = dict(model.named_modules())

    def start(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    for parameter in setup.parameters:
        for use in parameter.uses:
            modules[use.module].register_forward_hook(start)
    return model


def batches_of(setup: Setup, budget: int) -> list[Batch]:
    plan = plan_batches(np.array([row["length"] for row in setup.rows]), budget)
    return [setup.task.collate([setup.rows[i] for i in positions]) for positions in plan]


def floor(setup: Setup, model: nn.Module, batches: list[Batch]) -> None:
    """Forward and activation-only backward of every batch; nothing is kept."""
    for batch in batches:
        setup.task.loss(model, batch).sum().backward()


def time_floor(setup: Setup, model: nn.Module, budget: int) -> float:
    batches = batches_of(setup, budget)
    return timed(partial(floor, setup, model, batches))


def collection(setup: Setup, folder: Path, norms: bool) -> tuple[WorkerContext, dict[str, Any], list[Unit]]:
    """Return a worker's context on a new run with a store, the stage's settings as the job makes them, and its units."""
    shutil.copytree(setup.home, folder)  # collection reads its own run's corpus
    run = Location.parse(str(folder))
    names = tuple(p.name for p in setup.parameters)
    gradients = GradientSpec(names, Projection(), norms, GradientsSection().token_budget)
    layout = row_layout(setup.parameters, gradients.projection)
    ranges = [asdict(r) for r in layout.ranges]
    store = GradientStore.create(run, StoreSettings(layout.arrays, ranges, list(names), norms=norms))
    corpus = Corpus.open(run, TRAIN)
    for segment in corpus.segments:
        store.prepare(TRAIN, CHECKPOINT, segment.name, segment.rows, setup.shard_rows)
    settings = {"model": setup.spec, "gradients": gradients}
    return WorkerContext(run.uri), settings, setup.units


def time_collection(context: WorkerContext, settings: dict[str, Any], units: list[Unit]) -> float:
    """Return the seconds of all units, rows read from disk anew; what they wrote is removed afterwards."""
    began = time.perf_counter()
    for unit in units:
        collect_unit(context, settings, unit)
    seconds = time.perf_counter() - began
    context.corpus(None, TRAIN).close()
    for unit in units:
        at = unit.payload
        context.store(None).delete_shard(at["set"], at["checkpoint"], at["segment"], at["start"])
    return seconds


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Report each model's ratio of examples/s to the floor, and the floor itself."""
    found = []
    for cell, result in done.items():
        bottom = np.array(result["seconds"]["floor"])
        for label in NORMS:
            ratios = bottom / np.array(result["seconds"][label])
            interval = bootstrap_interval(ratios, statistic=np.median)
            found.append(Gate(f"{cell}: collection / floor, {label}", float(np.median(ratios)), interval))
        rates = result["examples"] / bottom
        interval = bootstrap_interval(rates, statistic=np.median)
        name = f"{cell}: floor, examples/s (token budget {result['floor_budget']})"
        found.append(Gate(name, float(np.median(rates)), interval))
    return found


EXPERIMENT = Experiment(
    name="collect",
    claim="examples/s of collection on one thread, as a ratio to forward + activation-only backward in plain code",
    minutes=5,
    cells=cells,
    run=run_model,
    gates=gates,
)
