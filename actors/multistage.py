"""The stage between prepare and score of multi-stage influence: the queries' gradients become s over (W, U).

Both inverse Hessians are solved as those of one-stage influence are, each under a label of its own, so that a killed driver
goes on where it was. The mixed product F_WΘ v of case 1 is a product of the whole Hessian over (W, Θ).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from actors.block_solver import BlockSolver
from actors.operator import DistributedOperator
from actors.plan import sampled_ids
from actors.solve import leave_out, one_thread, warnings
from actors.solve_job import Notes, SolveJob, figures_key
from actors.specs import CurvatureSpec, GradientSpec
from actors.states import SavedState, gradients_key, parse_state, save_state, state_key
from engine.coordinates import Coordinates, flat_coordinates
from engine.methods.contract import QueryState
from engine.multistage import Inverse, Parts, Shared, fixed, proximal, updated
from storage.damage import read_checked
from storage.locations import ObjectRecord, to_json

STAGES = ("finetuning", "pretraining")


@dataclass(frozen=True)
class StagesJob:
    """Both solves, and how the stages hang together."""

    label: str
    notes: Notes  # of the stage solve-<label>
    finetuning: SolveJob  # over Θ where W stays, else over (W, Θ); label <label>-finetuning
    pretraining: SolveJob  # over (W, U); label <label>-pretraining
    joint: GradientSpec  # of (W, Θ)
    sizes: dict[str, int]  # numbers of every weight of (W, Θ), in the model's order
    shared: Shared  # where W stands in the vectors of both stages
    alpha: float | None  # of α ‖W − W̄‖²; None: W stays
    summed: bool  # the queries' sum is asked about


def solve_stages(job: StagesJob) -> None:
    """Leave both parts of s of every query where scoring reads them, unless they are there. Raises what solvers raise."""
    pre, label = job.pretraining, job.label
    if pre.run.exists(figures_key(label)) and "state" in job.notes.done():
        return
    joint, ours = flat_coordinates(job.sizes), flat_coordinates(pre.sizes)
    said: dict[str, Any] = {}
    with one_thread():
        fine = job.finetuning.checkpoint
        asked = parse_state(read_checked(pre.run, f"prepare-{label}", fine, gradients_key(label, fine)))
        f = joint.join(asked.arrays)
        parts = adjoint(job, f.sum(1, keepdim=True) if job.summed else f, said)
    losses = asked.losses.sum()[None] if job.summed else asked.losses
    arrays = {
        name: array.float()
        for name, array in ours.split(torch.cat([parts.through_own, parts.through_shared], 1)).items()
    }
    weight = -leave_out(pre.corpus)
    state = QueryState(arrays, None, torch.cat([losses, losses]), weight, ())
    for stage in STAGES:
        for warning in warnings(said[stage], getattr(job, stage).inverse):
            pre.say(f"warning: {stage}: {warning}")
    leave(job, state, said)


def adjoint(job: StagesJob, f: Tensor, said: dict[str, Any]) -> Parts:
    """Return both parts of s of every query; `said` takes the figures of both solves."""
    own, shared = job.finetuning, job.shared
    pretraining = inverse(job.pretraining, "pretraining", said)
    if job.alpha is None:
        ids = sampled_ids(own.corpus, own.inverse.rows, own.seed)
        curvature = CurvatureSpec(own.checkpoint, "hessian", own.inverse.dtype, own.score.corpus, own.score.home)
        settings = own.settings | {"gradients": job.joint, "curvature": curvature}
        hessian = DistributedOperator(own.pool, settings, shared.finetuning_size, ids, own.block_rows, 0.0, own.events)
        return fixed(f, inverse(own, "finetuning", said), hessian, pretraining, shared)
    held = replace(own, inverse=replace(own.inverse, l2=proximal(own.inverse.l2, job.alpha, shared)))
    return updated(f, inverse(held, "finetuning", said), pretraining, shared, job.alpha)


def inverse(job: SolveJob, stage: str, said: dict[str, Any]) -> Inverse:
    """Return the damped inverse of one stage's curvature; what it multiplies, and the result, are float32 in files."""
    space, key = flat_coordinates(job.sizes), gradients_key(job.label, job.checkpoint)

    def solved(b: Tensor) -> Tensor:
        if not job.run.exists(key):
            job.check()
            job.run.create(key, save_state(right_sides(space, b)))
        arrays, said[stage] = BlockSolver(job).solve(SavedState.open(job.run, key))
        return space.join(arrays)

    return solved


def right_sides(space: Coordinates, b: Tensor) -> QueryState:
    arrays = {name: array.float() for name, array in space.split(b).items()}
    return QueryState(arrays, None, torch.zeros(b.shape[1], dtype=torch.float64), 1.0, ())


def leave(job: StagesJob, state: QueryState, said: dict[str, Any]) -> None:
    """Write the state that scoring reads and what the solvers said, and note them; drop what they were made from."""
    pre, label = job.pretraining, job.label
    figures = {"case": "fixed" if job.alpha is None else "updated", "alpha": job.alpha, **said}
    data = {state_key(label, pre.checkpoint): save_state(state), figures_key(label): to_json(figures)}
    pre.check()
    for key, content in data.items():
        pre.run.delete(key)  # of a driver that was killed here
        pre.run.create(key, content)
    job.notes.commit("state", {"objects": [asdict(ObjectRecord.of(key, content)) for key, content in data.items()]})
    for stage in STAGES:
        for key in pre.run.list(f"states/{getattr(job, stage).label}"):
            pre.run.delete(key)
