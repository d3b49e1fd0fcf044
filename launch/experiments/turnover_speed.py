"""turnover.speed: how long does one query take by turn-over dropout, and by influence functions of the same weights?

MiniLM with adapters and a head, trained under masks on N movie reviews, masked in all layers or in the top third. Turn-over
dropout runs the query under both masks of every review, as the job does. Influence solves for the query (Gauss-Newton,
λ = .1 λ_max, by LiSSA on small batches, whose full run is held to a mean relative residual of .1 over all reviews) and takes
every review's derivative along the solution, one forward pass in forward mode. Beside it the paper's arm: LiSSA of one
example a step, as many steps as there are reviews, and one backward pass for every review (Koh & Liang, as timed by
Kobayashi et al. 2020, appendix B). λ_max is found once for a model and is not counted.

A round times all passes in turning order, with a query of its own of median length, on its own share of the reviews or of
the solver's steps, all of equal cost: figures are for all of them. Two more cells: the peak memory of fresh processes that
run a query under hash-composed masks of few ids and of many.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.context import make_task
from actors.specs import ModelSpec
from actors.worker import peak_memory
from engine.batches import Batch, plan_batches
from engine.coordinates import Coordinates, chosen_coordinates
from engine.curvature import Curvature, Examples, LocalOperator, directional_derivatives, losses_at
from engine.gradients import PerExampleGradients
from engine.masks import MaskSettings
from engine.memory import CPU_TOKENS
from engine.metrics import bootstrap_interval
from engine.parameters import select_parameters
from engine.projectors import Dense
from engine.solvers import finish, largest_eigenvalue, relative
from engine.stochastic_solvers import Lissa, lissa_repetition
from engine.tasks.contract import Task, encode, initialise
from engine.training import TrainSettings, train
from engine.turnover import TurnOver, under_own_masks
from engine.turnover_scores import Estimator, repeated
from launch.experiments.collect import base_folder, in_process, median, run_round, timed
from launch.experiments.kept import kept
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import mlp, read_records
from launch.forward import TOKENS
from launch.turnover import add_masks, what_trains
from launch.turnover_section import TurnOverSection

LAYERS = {"all": "masks in all layers", "top": "masks on the top third"}
MEMORY = ("few", "many")
ASKED = {"all": 1.5, "top": 3.0}
SHARED = 2.5
PAPER = 17.0
SIDES: Any = ("own", "flipped")
_SOLVED = 3  # queries whose solves are run in full
_CACHE = 4 << 30  # bytes of what frozen lower layers give


@dataclass(frozen=True)
class Work:
    """The trained network, the reviews that it learned and the queries, one a round, all of one length."""

    task: Task
    model: nn.Module
    turnover: TurnOver
    space: Coordinates  # of the trained weights
    train: list[dict]
    queries: list[dict]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row["input_ids"]) for row in self.train])

    def batches(self, rows: np.ndarray) -> Iterator[Batch]:
        """Yield these reviews, those of like length together."""
        for positions in plan_batches(self.lengths[rows], CPU_TOKENS):
            yield self.task.collate([self.train[i] for i in rows[positions]])

    def query(self, number: int) -> Batch:
        return self.task.collate([self.queries[number]])

    def operator(self, rows: int) -> LocalOperator:
        """Return Gauss-Newton products of the first reviews' mean loss, or of the reviews with given ids."""
        blocks = [list(self.batches(block)) for block in np.array_split(np.arange(rows), -(-rows // 256))]
        examples = Examples(torch.arange(rows), blocks, lambda ids: list(self.batches(ids.numpy())))
        return LocalOperator(Curvature(self.model, self.task.loss, self.space), examples, cache_bytes=_CACHE)

    def gradient(self, query: Batch) -> Tensor:  # (size, 1) float64
        named = dict(self.model.named_parameters())
        weights = [named[w.name].detach().requires_grad_() for w in self.space.weights]
        with torch.enable_grad():
            losses = losses_at(self.model, self.task.loss, self.space, weights, query)
            return self.space.flat(torch.autograd.grad(losses.sum(), weights)).double()[:, None]


def cells(config: dict[str, Any]) -> list[str]:
    return [*LAYERS, *(f"memory-{which}" for which in MEMORY)]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    if cell in LAYERS:
        return in_process(config, partial(measure, config, cell))
    return in_process(config, partial(remember, config, config["memory_ids"][cell.removeprefix("memory-")]))


def measure(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return every pass's seconds in every round, for all reviews, one query; and how well a full solve does."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        work = make_work(config, cell, Path(folder))
    few = work.operator(config["largest_rows"])
    found: list[float] = []
    finding = timed(lambda: found.append(finish(largest_eigenvalue(few, tolerance=0.01))))
    lissa = Lissa(0.1 * found[0], config["lissa"]["scale"] * found[0], **config["lissa"]["run"])
    whole = range(config["rounds"])
    rounds = [run_round(passes(config, work, lissa, found[0], number), number) for number in whole]
    return {
        "seconds": {name: [round(one[name], 3) for one in rounds] for name in rounds[0]},
        "residuals": residuals(work, lissa, found[0], min(_SOLVED, config["rounds"])),
        "seconds of λ_max": round(finding, 2),
        "weights": work.space.size,
        "tokens": round(float(work.lengths.mean()), 1),
        "tokens of a query": len(work.queries[0]["input_ids"]),
    }


def passes(
    config: dict[str, Any], work: Work, lissa: Lissa, largest: float, number: int
) -> dict[str, Callable[[], float]]:
    """Return what a round times; every pass gives the seconds of all reviews, of all steps."""
    rounds, parts, many, total = config["rounds"], config["parts"], config["many"], len(work.train)
    share = np.arange(total)[number::rounds]
    query, x = work.query(number), work.gradient(work.query(number))
    block = torch.cat([work.gradient(work.query(i % rounds)) for i in range(many)], 1)
    single = Lissa(lissa.damping, lissa.scale * config["paper"]["scale"], config["paper"]["steps"], 1, 1, number)

    def solve(columns: Tensor, settings: Lissa) -> None:
        finish(lissa_repetition(work.operator(1), columns, torch.arange(total), settings, 0, largest))

    def steps(count: int) -> Lissa:
        return Lissa(lissa.damping, lissa.scale, count, lissa.batch_size, 1, number)

    def of_all(call: Callable[[], None], times: float) -> Callable[[], float]:
        return lambda: times * timed(call)

    some = share[:: parts["rows"]]
    pairs, fits = torch.from_numpy(share), TOKENS["cpu"] // len(work.queries[0]["input_ids"])
    return {
        "turn-over": of_all(partial(masked, work, pairs, query, fits), total / len(share)),
        "two forwards": of_all(partial(two_forwards, work, torch.from_numpy(some), query), total / len(some)),
        "solve": of_all(partial(solve, x, steps(parts["steps"])), lissa.iterations / parts["steps"]),
        "derivatives": of_all(partial(derivatives, work, share, x), total / len(share)),
        "paper's solve": of_all(partial(solve, x, single), total / single.iterations),
        "paper's gradients": of_all(partial(one_by_one, work, share[: parts["single"]], x), total / parts["single"]),
        "many: solve": of_all(partial(solve, block, steps(parts["many"])), lissa.iterations / parts["many"]),
        "many: products": of_all(partial(products, work, some, block), total / len(some)),
    }


def masked(work: Work, ids: Tensor, query: Batch, rows: int) -> None:
    """Run the query under both masks of every id, as the job does."""
    Estimator(work.turnover, work.task.loss).losses(ids, query, SIDES, rows)


def two_forwards(work: Work, ids: Tensor, query: Batch) -> None:
    """The same without sharing anything between two masks, in batches of the size that suits a whole pass best."""
    rows = CPU_TOKENS // query["input_ids"].shape[1]
    with torch.inference_mode():
        for some in ids.split(rows):
            for side in SIDES:
                work.turnover.use(some, side)
                work.task.loss(work.model, repeated(query, len(some)))
    work.turnover.off()


def derivatives(work: Work, rows: np.ndarray, x: Tensor) -> None:
    """Take every review's derivative along x (any vector costs the same)."""
    for batch in work.batches(rows):
        directional_derivatives(work.model, work.task.loss, work.space, batch, x[:, 0])


def one_by_one(work: Work, rows: np.ndarray, x: Tensor) -> None:
    """Take every review's gradient by itself and multiply it with x, as the code of the first papers does."""
    for row in rows:
        (work.gradient(work.task.collate([work.train[row]])) * x).sum()


def products(work: Work, rows: np.ndarray, block: Tensor) -> None:
    """Multiply every review's gradient with the columns of a block."""
    chosen = select_parameters(work.model, [w.name for w in work.space.weights])
    vectors = {name: part.float() for name, part in work.space.split(block).items()}
    with PerExampleGradients(work.model, chosen, Dense(vectors)) as hooks:
        for batch in work.batches(rows):
            hooks(work.task.loss, batch)


def residuals(work: Work, lissa: Lissa, largest: float, queries: int) -> list[float]:
    """Return the relative residual of the solver's whole run for each of the first queries, on all reviews."""
    b = torch.cat([work.gradient(work.query(number)) for number in range(queries)], 1)
    x = finish(lissa_repetition(work.operator(1), b, torch.arange(len(work.train)), lissa, 0, largest))
    return relative(b - work.operator(len(work.train)).apply(x) - lissa.damping * x, b).tolist()


def make_work(config: dict[str, Any], layers: str, folder: Path) -> Work:
    """Build and train the network: its adapters and head, under masks. Trained weights are kept."""
    base = base_folder(config["model"], folder)
    task = make_task(ModelSpec("text-classification", config["task_settings"], (), "float32", "sdpa"), base, folder)
    torch.manual_seed(0)
    model = initialise(task, base)
    rows = {part: read_rows(config, task, part) for part in ("train", "test")}
    section = TurnOverSection(adapters=config["adapters"], layers=layers)
    turnover = add_masks(model, task, section, rows["train"], 0, 0)
    settings = what_trains(model, section, TrainSettings(**config["train"], checkpoints=1), False)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]

    def make() -> dict[str, Tensor]:
        for _ in train(model, under_own_masks(turnover, task.loss), task.collate, rows["train"], settings):
            pass
        return {name: weight.detach().clone() for name, weight in model.named_parameters() if name in names}

    given = {key: config[key] for key in ("model", "task_settings", "corpus", "rows", "adapters", "train")}
    model.load_state_dict(kept("turnover-speed", [given, layers], make), strict=False)
    turnover.off()
    return Work(task, model.eval().requires_grad_(False), turnover, chosen_coordinates(model, names), rows["train"],
                of_one_length(rows["test"], config["rounds"]))  # fmt: skip


def read_rows(config: dict[str, Any], task: Task, part: str) -> list[dict]:
    records = read_records(config["corpus"].format(part=part))[: config["rows"][part]]
    return [record | row | {"id": i} for i, record in enumerate(records) for row in encode(task, record)]


def of_one_length(rows: list[dict], count: int) -> list[dict]:
    """Return the reviews whose lengths are nearest to the median, cut to the shortest of them."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    nearest = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:count]
    return [rows[i] for i in nearest]


def remember(config: dict[str, Any], ids: int) -> dict[str, Any]:
    """Return the peak memory, bytes, of a process that runs a query under the hash-composed masks of so many ids."""
    torch.manual_seed(0)
    model = mlp([64, 256, 256, 2]).eval()
    turnover = TurnOver(model, MaskSettings(kind="hashed"), after=["1", "3"])
    query = Batch(torch.tensor([-1]), {"x": torch.randn(1, 64)})

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).square().sum(1)

    estimator, total = Estimator(turnover, loss), 0.0
    for first in range(0, ids, config["memory_shard"]):
        some = torch.arange(first, min(first + config["memory_shard"], ids))
        total += float(estimator.influence(some, query).sum())
    return {"bytes": peak_memory(), "ids": ids, "mean influence": total / ids}


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge influence's seconds as a multiple of turn-over's, the shared prefix, and memory; report the phases."""
    found: list[Gate] = []
    for layers, name in LAYERS.items():
        result = done[layers]
        seconds = {label: np.array(values) for label, values in result["seconds"].items()}
        found += [*ratios(name, layers, seconds), overtakes(name, config["many"], seconds)]
        off = np.array(result["residuals"])
        mean, interval = float(off.mean()), bootstrap_interval(off)
        found.append(Gate(f"{name}: relative residual of the solve", mean, interval, 0.1, at_least=False))
        found += [median(f"{name}: {label}, seconds", values) for label, values in seconds.items()]
        found.append(Gate(f"{name}: λ_max, seconds, not counted", result["seconds of λ_max"]))
    few, many = (done[f"memory-{which}"]["bytes"] for which in MEMORY)
    ids = config["memory_ids"]["many"]
    return [*found, Gate(f"peak memory, {ids:,} ids / few", many / few, threshold=1.1, at_least=False)]


def ratios(name: str, layers: str, seconds: dict[str, np.ndarray]) -> list[Gate]:
    """Return how many times longer the others take."""
    own, influence = seconds["turn-over"], seconds["solve"] + seconds["derivatives"]
    paper = (seconds["paper's solve"] + seconds["paper's gradients"]) / own
    shared = SHARED if layers == "top" else None
    return [
        median(f"{name}: influence / turn-over dropout", influence / own, ASKED[layers], paper=PAPER),
        median(f"{name}: the paper's arm / turn-over dropout", paper, paper=PAPER),
        median(f"{name}: two full forwards / shared prefix", seconds["two forwards"] / own, shared),
    ]


def overtakes(name: str, many: int, seconds: dict[str, np.ndarray]) -> Gate:
    """Return the number of queries from which influence takes less; its cost is taken to be linear between one and many."""
    own, one, block = (
        float(np.median(sum(seconds[label] for label in labels)))
        for labels in (("turn-over",), ("solve", "derivatives"), ("many: solve", "many: products"))
    )
    each = (block - one) / (many - 1)
    queries = (one - each) / (own - each) if own > each else 0.0
    return Gate(f"{name}: queries from which influence takes less (0: never)", queries)


EXPERIMENT = Experiment(
    name="turnover.speed",
    claim="One query costs less by turn-over dropout than by influence functions of the same weights",
    minutes=40,
    cells=cells,
    run=run_cell,
    gates=gates,
)
