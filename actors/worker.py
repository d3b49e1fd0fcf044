"""The worker: it has no logic. It carries out one unit function under its context and says what it cost."""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from actors.collect import collect_unit, inspect_unit
from actors.compute import compute_unit
from actors.context import WorkerContext
from actors.curvature import curvature_unit, gram_unit, lissa_unit, sketch_unit
from actors.features import features_unit
from actors.multistage_scores import multistage_unit
from actors.prepare import prepare_unit
from actors.representer import head_sizes_unit, head_unit
from actors.score import score_unit
from actors.turnover import turnover_unit
from actors.units import Receipt, Unit
from storage.damage import noting_damage

UnitFunction = Callable[[WorkerContext, dict[str, Any], Unit], Receipt]
UNIT_FUNCTIONS: dict[str, UnitFunction] = {
    "inspect": inspect_unit,
    "collect": collect_unit,
    "prepare": prepare_unit,
    "score": score_unit,
    "compute": compute_unit,
    "features": features_unit,
    "turnover": turnover_unit,
    "multistage": multistage_unit,
    "head-sizes": head_sizes_unit,
    "head": head_unit,
    "curvature": curvature_unit,
    "lissa": lissa_unit,
    "sketch": sketch_unit,
    "gram": gram_unit,
}
_OVERLAPPING = {"collect"}  # take the worker's turns themselves


class Worker:
    """One worker of a run. On a CPU a unit runs on one thread, so that its bits do not depend on the machine's load."""

    def __init__(self, run: str, device: str) -> None:
        self.context = WorkerContext(run, "cuda" if device == "cuda" else "cpu")

    def run(self, function: str, settings: dict[str, Any], unit: Unit) -> Receipt:
        threads = torch.get_num_threads()
        if self.context.device.type == "cpu":
            torch.set_num_threads(1)
        began = time.perf_counter()
        try:
            turn = nullcontext() if function in _OVERLAPPING else self.context.computing
            with noting_damage(self.context.run), turn:
                receipt = UNIT_FUNCTIONS[function](self.context, settings, unit)
        finally:
            torch.set_num_threads(threads)
        return replace(receipt, seconds=time.perf_counter() - began, peak_memory=peak_memory())


@dataclass(frozen=True)
class MakeWorker:
    """The picklable factory of a run's workers."""

    run: str
    device: str

    def __call__(self) -> Worker:
        return Worker(self.run, self.device)


def peak_memory() -> int:
    """Return this process's largest resident size so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
