"""The stage between prepare and score: the queries' gradients times the inverse curvature.

It leaves the state that scoring reads, and figures.json: what the solver says of every query.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch

from actors import projected, sketch
from actors.block_solver import BlockSolver
from actors.projected import make_gram, solve_rows
from actors.solve_job import SolveJob, figures_key
from actors.states import SavedState, gradients_key, save_state, state_key, unfinished_key
from engine.influence import per_example_loo
from engine.methods.contract import QueryState
from engine.methods.inverse import InverseCurvature
from engine.solvers import MAX_EXACT
from storage.corpus import Corpus
from storage.damage import refuse_damaged
from storage.locations import Location, ObjectRecord, to_json

LITTLE = 0.97  # correlation with the plain gradient from which the curvature has changed little
_BLOCKS = 4  # of (size, k) that a solver holds
_MORE = {"lissa": 3}  # beyond them: the mean of the repetitions, their squares and the next one
REMEDIES = {  # besides a larger damping
    "lissa": "method.depth, method.batch_size or method.repetitions",
    "sketch": "method.depth, method.batch_size or method.columns",
}


def solve(job: SolveJob) -> None:
    """Leave (C + λI)⁻¹ ∇ℓ(q) of every query where scoring reads it, unless it is there. Raises what the solvers raise.

    What the journal names as damaged is made anew: the state, and what new queries are answered from.
    """
    run, label = job.run, job.label
    with one_thread():
        if run.exists(figures_key(label)) and "state" in job.notes.done():
            keep_for_new(job)
            return
        key = gradients_key(label, job.checkpoint)
        refuse_damaged(run, f"prepare-{label}", job.checkpoint, key)
        asked = SavedState.open(run, key)
        arrays, said = solve_rows(job, asked) if job.inverse.solver == "projected" else BlockSolver(job).solve(asked)
    for warning in warnings(said, job.inverse):
        job.say(f"warning: {warning}")
    candidates, probes = job.chosen or (None, None)
    state = replace(asked.rest, arrays=arrays, weight=leave_out(job.corpus), candidates=candidates, probes=probes)
    data = {state_key(label, job.checkpoint): save_state(state), figures_key(label): to_json(said)}
    job.check()
    for key, content in data.items():
        run.delete(key)  # of a driver that was killed here, or damaged
        run.create(key, content)
    job.notes.commit("state", {"objects": [asdict(ObjectRecord.of(key, content)) for key, content in data.items()]})
    for folder in (f"states/{label}/solved", f"states/{label}/lissa", unfinished_key(label)):
        for key in run.list(folder):
            run.delete(key)


def keep_for_new(job: SolveJob) -> None:
    """Make anew what of a settled solve new queries need, if it was damaged."""
    if job.inverse.solver == "projected":
        make_gram(job)
    elif job.inverse.solver == "sketch":
        BlockSolver(job).sketch()


def solve_new(run: Location, label: str, inverse: InverseCurvature, state: QueryState, weight: float) -> QueryState:
    """Return new queries' state as scoring takes it, from what the label's own queries were solved with."""
    if inverse.solver == "sketch":
        return sketch.solve_new(run, label, state, weight)
    return projected.solve_new(run, label, inverse, state, weight)


def leave_out(corpus: Corpus) -> float:
    """Return the factor that turns a product into the effect of leaving one example out."""
    one = torch.ones((), dtype=torch.float64)
    return float(per_example_loo(one, corpus.rows - len(corpus.erased())))


def warnings(said: dict[str, Any], inverse: InverseCurvature) -> list[str]:
    """Return what a reader of these scores should know of their solve."""
    found = []
    short = [residual for residual, good in zip(said["residual"], said["converged"], strict=True) if not good]
    if short:
        remedy = REMEDIES.get(inverse.solver, "method.max_iterations or method.dtype=float64")
        found.append(
            f"{len(short)} of {len(said['residual'])} queries are not solved well: relative residual up to {max(short):.2g}. "
            f"Try a larger method.damping, {remedy}."
        )
    near = [cosine for cosine in said["identity"] if cosine >= LITTLE]
    if near:
        found.append(
            f"the curvature changed little: for {len(near)} of {len(said['identity'])} queries the result's correlation "
            f"with the plain gradient is {LITTLE} or more (λ = {said['damping']:.3g}, λ_max = {said['largest']:.3g}). "
            f"A smaller method.damping changes more."
        )
    return found


def refuse_unfit(inverse: InverseCurvature, sizes: dict[str, int], queries: int, free: int | None = None) -> None:
    """Raise ValueError for a solve that the driver's memory (free: bytes; None: what is) or an exact one cannot hold."""
    size, width = sum(sizes.values()), min(queries, inverse.query_block)
    if inverse.solver in ("exact", "projected") and size > MAX_EXACT:
        raise ValueError(
            f"method.solver={inverse.solver} makes a whole matrix, of at most {MAX_EXACT} columns; here it has {size:,}: "
            f"choose fewer gradients.modules, " + ("or cg." if inverse.solver == "exact" else "or a smaller dim.")
        )
    need = 8 * (_BLOCKS + _MORE.get(inverse.solver, 0)) * size * width + 2 * 4 * size * queries
    need += 3 * 8 * size**2 if inverse.solver == "exact" else 0  # the matrix, what it is made of, its factor
    free = psutil.virtual_memory().available if free is None else free
    if need > free:
        raise ValueError(
            f"solving for {queries} queries, {width} at a time, over {size:,} weights needs {need / 2**30:.2f} GiB on the "
            f"driver, of which {free / 2**30:.2f} GiB are free: choose fewer gradients.modules, fewer queries, a smaller "
            f"method.query_block, or method.solver=projected."
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the driver's own sums have one thread, so that their bits do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
