"""Both stages of the multi-stage experiments on digits, trained to the last digits, and trained again without an example.

    case 1   Θ at the minimum of fine-tuning on the features that W̄ gives
    case 2   (W, Θ) at the minimum of fine-tuning with α ‖W − W̄‖²

The truth of an example is what the test images' summed loss rises by when pretraining, and then fine-tuning, is done again
without it: L-BFGS in the coordinates of the full data's factorised Hessian, from the weights that all examples left, until
the gradient is at most `tolerance` long. Plain steps with that Hessian are its first; they alone leave the region where they
converge for the examples of largest influence.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.context import cache_folder
from actors.specs import digest
from engine.batches import Batch
from engine.counters import derive_key, permutation
from engine.minimum import descend, scaling_of, settle
from engine.multistage import Inverse, Parts, Shared, fixed, updated
from launch.experiments.multistage_digits import (
    Objective,
    Pull,
    adam,
    images,
    network,
    on_features,
    places,
)
from launch.experiments.subjects import ROOT

ROUNDS = 5  # Hessians that may be made to leave one example out
CELLS = ROOT / "tests" / "benchmarks" / "results" / "cells"


@dataclass(frozen=True)
class Minimum:
    """An objective at its minimum, with the Hessian there."""

    objective: Objective
    x: Tensor
    hessian: Tensor

    def inverse(self, b: Tensor) -> Tensor:
        return torch.linalg.solve(self.hessian, b)

    @property
    def scaling(self) -> Tensor:
        return scaling_of(self.hessian)


@dataclass(frozen=True)
class Case:
    """Both stages, and how the second is done again."""

    pretraining: Minimum
    finetuning: Minimum  # over Θ in case 1, over (W, Θ) in case 2
    joint: Objective  # of fine-tuning, over (W, Θ), without α's term
    x: Tensor  # (W, Θ)
    shared: Shared
    test: Batch
    again: Callable[[Tensor], Tensor]  # weights (W, U) of pretraining -> (W, Θ)

    def answer(self, x: Tensor) -> float:
        """Return the test images' summed loss at (W, Θ)."""
        return self.joint.summed(x, self.test)[0]

    @property
    def question(self) -> Tensor:
        """Return its gradient, (size, 1)."""
        return self.joint.summed(self.x, self.test)[1][:, None]

    def influence(self, parts: Parts) -> Tensor:
        """Return I(z, test set) of every pretraining image, [m]."""
        return self.pretraining.objective.along(self.pretraining.x, parts.whole[:, 0])


def pretrained(config: dict[str, Any]) -> Minimum:
    """Return the first stage, kept on this machine between cells; what is kept is looked at before it is used."""
    stages = config["stages"]
    settings = stages["pretraining"]
    digits = settings["digits"]
    objective = Objective(
        network(stages, len(digits), stages["seed"]), images(stages, digits, slice(*settings["rows"])), stages["l2"]
    )
    made_of = {key: stages[key] for key in ("data", "network", "seed", "l2", "tolerance", "pretraining")}
    file = cache_folder() / f"multistage-{digest(made_of)}.pt"
    if file.exists():
        x, hessian = torch.load(file)
        probe = torch.ones(len(x), 1, dtype=x.dtype)
        near = torch.allclose(objective.operator(x).apply(probe), hessian @ probe, rtol=1e-9, atol=1e-9)
        if near and float(objective.slope(x)[1].norm()) <= stages["tolerance"]:
            return Minimum(objective, x, hessian)
    made = settings["adam"]
    x = adam(objective, objective.weights, made["epochs"], made["batch_size"], made["learning_rate"], stages["seed"])
    x, hessian = settle(objective, x, settings["steps"], settings["rounds"], stages["tolerance"])
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save((x, hessian), file)
    return Minimum(objective, x, hessian)


def fixed_case(config: dict[str, Any]) -> Case:
    """Return case 1."""
    pretraining, joint, shared, test, start = _second(config)
    steps, tolerance = config["stages"]["finetuning"]["steps"], config["stages"]["tolerance"]
    head = on_features(joint, start)
    theta, hessian = settle(head, torch.zeros(head.space.size, dtype=torch.float64), steps, 5, tolerance)
    own = Minimum(head, theta, hessian)
    scaling = own.scaling

    def again(x: Tensor) -> Tensor:
        moved = start.clone()
        moved[shared.finetuning] = x[shared.pretraining]
        moved[shared.own] = settled(on_features(joint, moved), theta, scaling, config)
        return moved

    whole = start.clone()
    whole[shared.own] = theta
    return Case(pretraining, own, joint, whole, shared, test, again)


def updated_case(config: dict[str, Any], alpha: float) -> Case:
    """Return case 2, converged."""
    pretraining, joint, shared, test, start = _second(config)
    settings = config["stages"]["finetuning"]

    def held(x: Tensor) -> Objective:
        pull = Pull(alpha, shared.finetuning, x[shared.pretraining])
        return Objective(joint.model, joint.examples, joint.l2, pull=pull)

    objective = held(pretraining.x)
    x, hessian = settle(objective, start, settings["steps"], 5, config["stages"]["tolerance"])
    both = Minimum(objective, x, hessian)
    scaling = both.scaling
    return Case(
        pretraining, both, joint, x, shared, test, lambda moved: settled(held(moved), x, scaling, config)
    )  # fmt: skip


def _second(config: dict[str, Any]) -> tuple[Minimum, Objective, Shared, Batch, Tensor]:
    """Return the first stage and what the second starts from: W̄ and Θ = 0."""
    stages, pretraining = config["stages"], pretrained(config)
    settings = stages["finetuning"]
    train, test = (images(stages, settings["digits"], slice(*settings[part])) for part in ("train", "test"))
    joint = Objective(network(stages, len(settings["digits"]), stages["seed"]), train, stages["l2"])
    shared = places(pretraining.objective, joint)
    start = started(joint, shared, pretraining.x)
    return pretraining, joint, shared, test, start


def started(joint: Objective, shared: Shared, x: Tensor) -> Tensor:
    """Return what fine-tuning starts from after pretraining has left x: its W, and Θ = 0."""
    start = torch.zeros(joint.space.size, dtype=torch.float64)
    start[shared.finetuning] = x[shared.pretraining]
    return start


def settled(objective: Objective, x: Tensor, scaling: Tensor, config: dict[str, Any]) -> Tensor:
    """Return the minimum near x. Raises FloatingPointError if the gradient stays longer than the tolerance."""
    return _reached(objective, x, scaling, None, config)


def without(case: Case, example: int, scaling: Tensor, config: dict[str, Any]) -> Tensor:
    """Return what pretraining leaves without one example, from what it left with it."""
    return _reached(case.pretraining.objective, case.pretraining.x, scaling, example, config)


def _reached(
    objective: Objective, x: Tensor, scaling: Tensor, example: int | None, config: dict[str, Any]
) -> Tensor:  # fmt: skip
    """Return the minimum near x, by a new Hessian where the full data's has not led there."""
    tolerance, steps = config["stages"]["left_out_tolerance"], config["stages"]["left_out_steps"]
    for _ in range(ROUNDS):
        x, _ = descend(lambda at: objective.slope(at, example), x, scaling, tolerance, steps)
        left = float(objective.slope(x, example)[1].norm())
        if left <= tolerance:
            return x
        scaling = scaling_of(objective.hessian(x))
    raise FloatingPointError(f"without example {example}: a gradient of {left:.2g} is left, at most {tolerance}")


def fixed_parts(case: Case, own: Inverse, pretraining: Inverse) -> Parts:
    return fixed(case.question, own, case.joint.operator(case.x), pretraining, case.shared)


def updated_parts(case: Case, alpha: float) -> Parts:
    return updated(case.question, case.finetuning.inverse, case.pretraining.inverse, case.shared, alpha)


def choose(scores: Tensor, config: dict[str, Any]) -> dict[str, list[int]]:
    """Return which examples are left out: those of largest |I|, and as many of the others at random."""
    count = config["left_out"] // 2
    top = scores.abs().argsort(descending=True, stable=True)[:count].numpy()
    order = permutation(derive_key(config["stages"]["seed"], "left out"), len(scores))
    return {"top": top.tolist(), "random": order[~np.isin(order, top)][:count].tolist()}


def pieces(config: dict[str, Any]) -> list[str]:
    """Return the cells of the examples left out: `left-<first>-<last>` of the 100."""
    step = config["examples_a_cell"]
    return [
        f"left-{first:03d}-{min(first + step, config['left_out']):03d}" for first in range(0, config["left_out"], step)
    ]


def piece_of(cell: str) -> slice:
    return slice(*(int(end) for end in cell.split("-")[1:]))


def found_before(experiment: str, cell: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the cell of another experiment on the same stages and examples, if its full-size pass has left one."""
    file = CELLS / experiment / f"{cell}.json"
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    return record["result"] if all(record["config"][key] == config[key] for key in ("stages", "left_out")) else None


held_case = lru_cache(maxsize=1)(lambda make, key: make(json.loads(key)))


def case_of(make: Callable[..., Case], config: dict[str, Any]) -> Case:
    """Return the case, made once in a row of cells."""
    return held_case(make, json.dumps(config))
