"""plan: what launch/plan.py foretells of a job against what the job then takes, on real data and real models.

A cell trains the model that its config says, once, then plans and runs the job in fresh processes, as the two commands
do. Compared are the seconds of the job, from its start to its index, with as many workers as the config asks for, and the
bytes of its run.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch.config import Config, load_config
from launch.experiments.registry import Experiment, Gate
from launch.job import score
from launch.plan import plan
from launch.train import train_model
from storage.locations import Location

ROOT = Path(__file__).resolve().parents[2]
TIME_OFF, BYTES_OFF = 0.25, 0.05


def cells(config: dict[str, Any]) -> list[str]:
    return [f"{name}-{number}" for name in config["jobs"] for number in range(config["rounds"])]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return what was foretold of a job, and what it took."""
    name = cell.rpartition("-")[0]
    job = config["jobs"][name]
    with tempfile.TemporaryDirectory(prefix="influence-foretold-") as folder:
        overrides = [*job["overrides"], f"checkpoints.path={folder}/model", f"run.uri={folder}/run"]
        settings = partial(load_config, str(ROOT / job["config"]), overrides)
        apart(config, partial(train, settings))
        foretold = apart(config, partial(foretell, settings))
        seconds = apart(config, partial(take, settings))
        run = Location.parse(f"{folder}/run")
        return {"foretold": foretold, "seconds": seconds, "bytes": sum(run.size(key) for key in run.list())}


def apart(config: dict[str, Any], call: Any) -> Any:
    """Return what a call gives, at full size in a process of its own: each command starts a Ray of its own."""
    if not config["own_process"]:
        return call()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(call).result()


def train(settings: Any) -> None:
    train_model(settings(), lambda _: None)


def foretell(settings: Any) -> dict[str, Any]:
    """Return the seconds and bytes that are foretold for the workers that the config asks for, and what the plan took."""
    config: Config = settings()
    began = time.monotonic()
    made = plan(config)
    workers = config.cluster.workers if isinstance(config.cluster.workers, int) else 1
    one = next(one for one in made.times if one.workers == workers)
    return {
        "seconds": one.total, "parts": one.seconds, "bytes": sum(made.bytes.values()), "memory": one.memory,
        "took": time.monotonic() - began,
    }  # fmt: skip


def take(settings: Any) -> float:
    config = settings()
    began = time.monotonic()
    score(config, lambda _: None)
    return time.monotonic() - began


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge how far the foretold seconds and bytes of each job were off; the median of the rounds."""
    found = []
    for name in config["jobs"]:
        rounds = [result for cell, result in done.items() if cell.rpartition("-")[0] == name]
        time_ratios = np.array([one["foretold"]["seconds"] / one["seconds"] for one in rounds])
        byte_ratios = np.array([one["foretold"]["bytes"] / one["bytes"] for one in rounds])
        found += [
            _off(f"seconds foretold, off by, {name}", time_ratios, TIME_OFF),
            _off(f"bytes foretold, off by, {name}", byte_ratios, BYTES_OFF),
            Gate(f"foretold over taken seconds, {name}", float(np.median(time_ratios)), _span(time_ratios)),
            Gate(f"seconds taken, {name}", float(np.median([one["seconds"] for one in rounds]))),
            Gate(f"seconds of the plan itself, {name}", float(np.median([one["foretold"]["took"] for one in rounds]))),
        ]
    return found


def _off(name: str, ratios: np.ndarray, most: float) -> Gate:
    return Gate(name, abs(float(np.median(ratios)) - 1), threshold=most, at_least=False)


def _span(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


EXPERIMENT = Experiment(
    name="plan",
    claim="time and bytes of a job as foretold by a probe of a few batches, against what it then takes",
    minutes=20,
    cells=cells,
    run=run_cell,
    gates=gates,
)
