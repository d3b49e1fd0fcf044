"""What a job will take, worked out: from a probe of this machine, or from a model's shape and figures of devices alone."""

import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from actors.context import cache_folder, make_task
from actors.plan import shard_length
from actors.solve import refuse_unfit
from engine.coordinates import top_layers
from engine.methods.contract import Method, inverse_of
from engine.parameters import select_parameters
from engine.projection import Projection, row_layout, unprojected_layout
from launch.config import Config
from launch.estimate import Shape, assumed_seconds, build_shape, index_rows, measured_seconds, read_devices
from launch.footprint import Size, block_bytes, gradient_bytes, score_bytes, state_bytes
from launch.influence import default_modules, solved_sizes
from launch.probe import Probe, count, describe, take_probe
from launch.sources import model_spec
from storage.gradients import StoreSettings

_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
_COPIES = 6  # of a shard's float32 rows on a worker: two units under way, each with its rows, stored rows and objects
_TOKEN_BYTES = 6  # of a token in rows.parquet with its share of the text, before anything was looked at
_INDEX_BYTES = 60  # of a row of the index's tables, likewise


@dataclass(frozen=True)
class Times:
    """What so many workers on one kind of device take."""

    device: str
    workers: int
    seconds: dict[str, float]  # by part of the job
    memory: int  # bytes of a worker: of the device, or of its process where it computes on a CPU
    limit: int  # bytes that the device has

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        return self.memory <= self.limit

    def record(self) -> dict[str, Any]:
        hours = self.total * self.workers / 3600
        return asdict(self) | {"total": self.total, "device_hours": hours, "fits": self.fits}


@dataclass(frozen=True)
class Plan:
    """What is foretold of a job."""

    size: Size
    units: dict[str, int]
    bytes: dict[str, int]  # by kind of object, at the end
    temporary: int  # bytes besides, which go before the end
    times: list[Times]
    probe: Probe | None

    def record(self) -> dict[str, Any]:
        return {
            "size": asdict(self.size), "units": self.units, "bytes": self.bytes | {"total": sum(self.bytes.values())},
            "temporary": self.temporary, "times": [one.record() for one in self.times],
            "probe": None if self.probe is None else describe(self.probe),
        }  # fmt: skip


def plan_by_probe(config: Config, method: Method) -> Plan:
    """Return the plan of a job whose checkpoints and corpus can be read here."""
    size, probe = measure(config)
    scored = len(method.checkpoints(size.checkpoints))
    top_k, stored = config.output.top_k, config.gradients.store
    cores = os.cpu_count() or 1
    on_gpu = torch.cuda.is_available() and config.cluster.device != "cpu" and config.cluster.backend == "ray"
    limit = torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    memory = worker_memory(probe, size, stored)
    here = torch.cuda.get_device_name(0) if on_gpu else "this machine"
    chosen = config.cluster.workers
    most = torch.cuda.device_count() if on_gpu else cores
    counts = sorted({1, most, *([chosen] if isinstance(chosen, int) else [])})
    times = [
        Times(here, n, measured_seconds(probe, size, scored, top_k, n, method), memory, limit if on_gpu else limit // n)
        for n in ([1] if config.cluster.backend == "in-process" else counts)
    ]
    if inverse := inverse_of(method):
        refuse_unfit(inverse, solved_sizes(inverse, probe.seen), size.queries)
    sizes = probed_bytes(config, probe, size, scored, method)
    row_bytes = sizes["gradients"] / (size.rows * size.checkpoints)
    solved = sum(solved_sizes(inverse, probe.seen).values()) if inverse else 0
    flops, weights = 4.0 * probe.seen["model_size"], probe.seen["model_size"]
    times += figures(config, size, method, flops, weights, row_bytes, solved, memory)
    return Plan(size, units(size, scored, stored), sizes, 0 if stored else block_bytes(size), times, probe)


def measure(config: Config) -> tuple[Size, Probe]:
    """Return how large the job is, and what a small part of it takes on this machine."""
    assert config.queries is not None
    with tempfile.TemporaryDirectory(prefix="influence-plan-") as folder:
        probe = take_probe(config, Path(folder))
        model, folders = model_spec(config, lambda _: None)
        task = make_task(model, folders[0], cache_folder())
        asked = config.plan.queries or count(config.queries, task).examples
        if config.plan.examples and config.plan.tokens:
            examples, tokens = config.plan.examples, config.plan.tokens
        else:
            found = count(config.corpus, task)
            examples, tokens = found.examples, found.tokens
    columns = sum(probe.seen["arrays"].values()) if config.gradients.store else 0
    itemsize = _ITEMSIZE[config.gradients.dtype] if columns else 4
    length = shard_length(examples, tokens, probe.seen["model_size"], columns, itemsize)
    return Size(examples, tokens, asked, len(model.checkpoints), config.gradients.shard_rows or length), probe


def plan_by_shape(config: Config, method: Method) -> Plan:
    """Return the plan of a job of which nothing but figures is at hand."""
    told, g = config.plan, config.gradients
    if not (told.examples and told.tokens and told.queries and told.model):
        raise ValueError("plan.model needs plan.examples, plan.tokens and plan.queries besides: nothing is read then.")
    longest = int(config.task.settings.get("max_tokens") or -(-told.tokens // told.examples))
    shape = build_shape(config.task.name, told.model, longest)
    named = g.modules or default_modules(config)
    patterns = named if isinstance(named, list) else top_layers(shape.model) if named == "top" else ["*"]
    parameters = select_parameters(shape.model, patterns)
    whole = g.projection == "none" and not g.store
    layout = (
        unprojected_layout(parameters)
        if whole
        else row_layout(parameters, Projection(g.projection, g.dim, config.run.seed))
    )
    names = [p.name for p in parameters]
    store = StoreSettings(layout.arrays, [asdict(r) for r in layout.ranges], names, g.dtype, norms=g.norms)
    columns = sum(layout.arrays.values()) if g.store else 0
    length = shard_length(told.examples, told.tokens, shape.size, columns, _ITEMSIZE[g.dtype])
    size = Size(told.examples, told.tokens, told.queries, told.checkpoints, g.shard_rows or length)
    scored = len(method.checkpoints(size.checkpoints))
    taken = Size(size.rows, size.tokens, size.queries, scored, size.shard_rows)
    found = {
        "corpus": _TOKEN_BYTES * size.tokens,
        "gradients": gradient_bytes(store, size) if g.store else 0,
        "states": state_bytes(store.arrays, len(names), taken),
        "scores": score_bytes(size, config.output.top_k, config.output.dense),
        "index": _INDEX_BYTES * index_rows(size.rows, size.queries, config.output.top_k),
    }
    memory = device_memory(config, shape, size, columns)
    row_bytes = found["gradients"] / (size.rows * size.checkpoints)
    solved = {p.name: p.size for p in parameters}
    if inverse := inverse_of(method):
        solved = store.arrays if inverse.solver == "projected" else solved
        refuse_unfit(inverse, solved, size.queries)
    flops, numbers = shape.flops_a_token(), sum(solved.values())
    times = figures(config, size, method, flops, shape.size, row_bytes, numbers, memory)
    return Plan(size, units(size, scored, g.store), found, 0 if g.store else block_bytes(taken), times, None)


def figures(
    config: Config, size: Size, method: Method, flops: float, weights: int, row_bytes: float, solved: int, memory: int
) -> list[Times]:
    """Return the times on devices that are known by their public figures alone; `flops` are of one token."""
    scored = len(method.checkpoints(size.checkpoints))
    devices, assumed = read_devices(config.plan.devices)
    compute, top_k = config.gradients.compute, config.output.top_k
    loaded = weights * (2 if compute == "bfloat16" else 4)
    return [
        Times(
            name, workers,
            assumed_seconds(size, scored, top_k, flops, one["flops"][compute], row_bytes, loaded, assumed, workers,
                            method, solved),
            memory, int(one["gib"] * 2**30),
        )
        for name, one in devices.items()
        for workers in config.plan.counts
    ]  # fmt: skip


def units(size: Size, scored: int, stored: bool) -> dict[str, int]:
    """Return the units of work of every stage."""
    shards = len(size.shards)
    first = {"collect": size.checkpoints * shards} if stored else {"compute": scored * shards}
    return {**first, "prepare": scored, "score": shards}


def probed_bytes(config: Config, probe: Probe, size: Size, scored: int, method: Method) -> dict[str, int]:
    """Return the bytes of every kind of object: exact where they follow from shapes, else as many a row as in the probe."""
    small = Size(probe.rows, probe.tokens, probe.queries, probe.checkpoints, probe.shard_rows)
    asked = len(method.checkpoints(probe.checkpoints))
    top_k, dense, measured = config.output.top_k, config.output.dense, probe.bytes
    shapes = probe.seen["arrays"] or dict(zip(probe.seen["parameters"], probe.seen["sizes"], strict=True))
    count = len(probe.seen["parameters"])

    def as_measured(kind: str, whole: int, part: int) -> int:
        return round(measured.get(kind, 0) * whole / part) if part else 0

    store, queries = probe.store, f"corpus/{config.queries.name if config.queries else ''}"
    found = {
        "corpus": as_measured("corpus/train", size.rows, probe.rows)
        + as_measured(queries, size.queries, probe.queries),
        "gradients": as_measured("gradients", gradient_bytes(store, size), gradient_bytes(store, small))
        if store
        else 0,
        "states": as_measured("answers", size.queries, probe.queries)
        + as_measured(
            "states", state_bytes(shapes, count, _with(size, scored)), state_bytes(shapes, count, _with(small, asked))
        ),
        "scores": as_measured("scores", score_bytes(size, top_k, dense), score_bytes(small, top_k, dense)),
        "index": as_measured(
            "index", index_rows(size.rows, size.queries, top_k), index_rows(probe.rows, probe.queries, top_k)
        ),
        "journal": as_measured(
            "journal", sum(units(size, scored, bool(store)).values()), sum(units(small, asked, bool(store)).values())
        ),
    }
    return found | {"other": sum(measured.get(kind, 0) for kind in ("other", "checkpoints", "stages", "events"))}


def _with(size: Size, checkpoints: int) -> Size:
    return replace(size, checkpoints=checkpoints)


def worker_memory(probe: Probe, size: Size, stored: bool) -> int:
    """Return the bytes that a worker comes to: what the probe's took, and what larger shards and more queries add."""
    columns = sum(probe.seen["arrays"].values())
    rows = 4 * columns * (size.shard_rows - probe.shard_rows) * (_COPIES if stored else 0)
    scores = 8 * 2 * (size.shard_rows * size.queries - probe.shard_rows * probe.queries)
    return probe.peak_memory + max(0, rows) + max(0, scores)


def device_memory(config: Config, shape: Shape, size: Size, columns: int) -> int:
    """Return the bytes that a worker needs on its device at least: weights, and one longest example with its rows."""
    itemsize = 2 if config.gradients.compute == "bfloat16" else 4
    held = (
        3 * itemsize * shape.numbers_a_token() * shape.tokens
    )  # put out, their gradients, and what is made in between
    return int(itemsize * shape.size + held + 4 * columns * size.shard_rows * 2)
