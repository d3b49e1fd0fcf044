"""multistage.speed: what does a pretraining example cost once both solves are done?

The floor is a plain forward and full backward pass of the same masked language model over the same batches, as pretraining
does it. Timed beside it: the products with both parts of one query's s, which is what the job makes of an example, and the
derivative along their sum alone by forward mode. Rounds time all passes in turning order. Seconds per example are compared
for a corpus and one four times as long, and the peak memory of fresh processes that score either. A last cell has one and two
Ray actors do the job's own units (two_actors.py).
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from actors.compute import block_key
from actors.plan import checkpoint_units, shards
from actors.pool import Pool
from actors.specs import CheckpointSpec, GradientSpec, ModelSpec, ScoreSpec
from actors.states import save_state, state_key
from actors.worker import peak_memory
from engine.batches import Batch, plan_batches
from engine.coordinates import chosen_coordinates
from engine.counters import derive_key, normals
from engine.curvature import directional_derivatives
from engine.gradients import PerExampleGradients
from engine.methods.contract import QueryState
from engine.models import ready_for_scoring
from engine.parameters import Parameter, select_parameters
from engine.projection import Projection
from engine.projectors import Dense
from engine.tasks.contract import Task, encode, load_task, with_model_folder
from launch.experiments.collect import ROOT, in_process, median, run_round, timed
from launch.experiments.registry import Experiment, Gate
from launch.experiments.two_actors import Work as Units
from launch.experiments.two_actors import scaling_gates, seconds
from storage.checkpoints import fingerprint
from storage.corpus import Corpus, ingest
from storage.locations import Location
from storage.readers import read_records
from storage.segments import Record

TRAIN, CHECKPOINT, LABEL = "train", "c0", "timed"
MEMORY = ("memory-short", "memory-long")
ACTORS = "actors"
TIMES = 4  # how much longer the second corpus is


@dataclass(frozen=True)
class Work:
    """A model, its task and the batches of a corpus, and of its first part."""

    task: Task
    folder: Path
    long: list[Batch]
    short: list[Batch]

    def model(self) -> nn.Module:
        return self.task.build(self.folder)


def cells(config: dict[str, Any]) -> list[str]:
    return ["seconds", *MEMORY, ACTORS]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    if cell == ACTORS:
        return measure_actors(config)
    return in_process(config, partial(measure if cell == "seconds" else remember, config, cell))


def measure(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the seconds of every pass in every round, and how many examples each has."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = make_work(config, Path(name))
        passes: dict[str, Callable[[], float]] = {
            "plain": partial(timed, partial(plain, work, work.model().train(False))),
            "both parts": partial(timed, scoring(work, work.short)),
            "along the sum": partial(timed, forward_mode(work)),
            "both parts, long": partial(timed, scoring(work, work.long)),
        }
        for one in passes.values():
            one()
        rounds = [run_round(passes, number) for number in range(config["rounds"])]
    counts = {name: sum(map(len, work.long if name.endswith("long") else work.short)) for name in passes}
    return {"seconds": {name: [round(one[name], 5) for one in rounds] for name in passes}, "examples": counts}


def remember(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the peak memory of a process that scores one of the corpora, bytes."""
    with tempfile.TemporaryDirectory() as name:
        work = make_work(config, Path(name))
        scoring(work, work.short if cell == MEMORY[0] else work.long)()
    return {"bytes": peak_memory()}


def plain(work: Work, model: nn.Module) -> None:
    """Take the gradient of every batch's mean loss by all weights."""
    for batch in work.short:
        work.task.loss(model, batch).mean().backward()
        model.zero_grad(set_to_none=True)


def scoring(work: Work, batches: list[Batch]) -> Callable[[], None]:
    """Return what multiplies every example's gradient with two vectors."""
    model = ready_for_scoring(work.model(), torch.device("cpu"), torch.float32)
    parameters = select_parameters(model, ["*"])
    hooks = PerExampleGradients(model, parameters, Dense(parts_of_s(parameters)))

    def score() -> None:
        for batch in batches:
            hooks(work.task.loss, batch)

    return score


def forward_mode(work: Work) -> Callable[[], None]:
    """Return what takes every example's derivative along one vector."""
    model = ready_for_scoring(work.model(), torch.device("cpu"), torch.float32)
    space = chosen_coordinates(model, ["*"])
    direction = torch.from_numpy(normals(derive_key(0, "sum"), 0, space.size))

    def score() -> None:
        for batch in work.short:
            directional_derivatives(model, work.task.loss, space, batch, direction)

    return score


def measure_actors(config: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of one and two actors, and of processes, that score the long corpus along both parts."""
    with tempfile.TemporaryDirectory() as name:
        work = make_units(config, make_work(config, Path(name)), Path(name))

        def on_pool(pool: Pool) -> None:
            work.on_pool(pool)
            work.taken()

        return {"seconds": seconds(config, work, on_pool)}


def make_units(config: dict[str, Any], work: Work, folder: Path) -> Units:
    """Write a run with the long corpus, the model and a query's parts of s; return the units that score it."""
    checkpoint = CheckpointSpec(CHECKPOINT, str(work.folder), 0, 1.0, fingerprint(work.folder))
    spec = ModelSpec("masked-lm", {"max_tokens": config["max_tokens"]}, (checkpoint,), "float32", "sdpa")
    run = Location.parse(str(folder / "run"))
    ingest(run, TRAIN, read_corpus(config), lambda record: encode(work.task, record))
    parameters = select_parameters(work.model(), ["*"])
    state = QueryState(parts_of_s(parameters), None, torch.zeros(2, dtype=torch.float64), 1.0, ())
    run.create(state_key(LABEL, CHECKPOINT), save_state(state))
    score = ScoreSpec(LABEL, "multistage", {}, (CHECKPOINT,), "asked", TRAIN, None, False, 10)
    names = tuple(p.name for p in parameters)
    settings = {
        "model": spec, "score": score,
        "gradients": GradientSpec(names, Projection("none"), False, config["token_budget"]),
    }  # fmt: skip
    units = checkpoint_units((CHECKPOINT,), shards(Corpus.open(run, TRAIN), config["shard_rows"]), TRAIN)
    return Units(run.uri, "compute", settings, units, [block_key(LABEL, unit.payload) for unit in units])


def parts_of_s(parameters: list[Parameter]) -> dict[str, torch.Tensor]:
    """Return random numbers in the place of both parts of a query's s."""
    key = derive_key(0, "parts")
    return {p.name: torch.from_numpy(normals(key, i, 2 * p.size)).float().view(2, -1) for i, p in enumerate(parameters)}


def read_corpus(config: dict[str, Any]) -> Iterator[Record]:
    return islice(read_records(str(ROOT / config["corpus"])), TIMES * config["rows"])


def make_work(config: dict[str, Any], folder: Path) -> Work:
    """Build the model with new weights and cut the corpus into batches."""
    tokenizer = AutoTokenizer.from_pretrained(Location.parse(config["tokenizer"]).fetch(folder / "cache"))
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**config["shape"])).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = with_model_folder("masked-lm", {"max_tokens": config["max_tokens"]}, folder / "model")
    task = load_task("masked-lm", settings)
    records = [record for record, _ in read_corpus(config)]

    def batches(count: int) -> list[Batch]:
        rows = [{**record, **row, "id": i} for i, record in enumerate(records[:count]) for row in encode(task, record)]
        lengths = np.array([len(row["input_ids"]) for row in rows])
        return [task.collate([rows[i] for i in places]) for places in plan_batches(lengths, config["token_budget"])]

    return Work(task, folder / "model", batches(TIMES * config["rows"]), batches(config["rows"]))


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge seconds per example as a multiple of the floor's, of the short corpus's, and the growth of memory."""
    result = done["seconds"]
    each = {name: np.array(values) / result["examples"][name] for name, values in result["seconds"].items()}
    short, long = (done[cell]["bytes"] for cell in MEMORY)
    return [
        median(
            "both parts, as a multiple of forward and full backward",
            each["both parts"] / each["plain"],
            1.5,
            at_least=False,
        ),
        median(
            f"per example, {TIMES} times as many", each["both parts, long"] / each["both parts"], 1.1, at_least=False
        ),
        Gate(f"peak memory, {TIMES} times as many", long / short, threshold=1.1, at_least=False),
        median("along the sum alone, as a multiple", each["along the sum"] / each["plain"]),
        median("seconds per example, both parts", each["both parts"]),
        *scaling_gates("scoring", done[ACTORS]["seconds"]),
    ]


EXPERIMENT = Experiment(
    name="multistage.speed",
    claim="A pretraining example is scored at about the cost of training on it once",
    minutes=15,
    cells=cells,
    run=run_cell,
    gates=gates,
)
