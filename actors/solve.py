"""The stage between prepare and score: the queries' gradients times the inverse curvature.

It leaves the state that scoring reads, and figures.json: what the solver says of every query.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch

from actors.block_solver import BlockSolver
from actors.projected import solve_rows
from actors.solve_job import SolveJob, figures_key
from actors.states import gradients_key, read_state, save_state, state_key
from engine.influence import per_example_loo
from engine.methods.inverse import InverseCurvature
from engine.solvers import MAX_EXACT
from storage.corpus import Corpus
from storage.locations import ObjectRecord

LITTLE = 0.97  # correlation with the plain gradient from which the curvature has changed little
_BLOCKS = 4  # of (size, k) that a solver holds


def solve(job: SolveJob) -> None:
    """Leave (C + λI)⁻¹ ∇ℓ(q) of every query where scoring reads it, unless it is there. Raises what the solvers raise."""
    run, label = job.run, job.label
    if run.exists(figures_key(label)):
        return
    queries = read_state(run, gradients_key(label, job.checkpoint))
    with one_thread():
        projected = job.inverse.solver == "projected"
        arrays, said = solve_rows(job, queries) if projected else BlockSolver(job).solve(queries)
    for warning in warnings(said, job.inverse):
        job.say(f"warning: {warning}")
    candidates, probes = job.chosen or (None, None)
    state = replace(queries, arrays=arrays, weight=leave_out(job.corpus), candidates=candidates, probes=probes)
    job.check()
    run.delete(state_key(label, job.checkpoint))  # of a driver that was killed here
    data = save_state(state)
    run.create(state_key(label, job.checkpoint), data)
    job.notes.commit("state", {"objects": [asdict(ObjectRecord.of(state_key(label, job.checkpoint), data))]})
    run.create_json(figures_key(label), said)
    for key in [*run.list(f"states/{label}/solved"), *run.list(f"states/{label}/lissa")]:
        run.delete(key)


def leave_out(corpus: Corpus) -> float:
    """Return the factor that turns a product into the effect of leaving one example out."""
    one = torch.ones((), dtype=torch.float64)
    return float(per_example_loo(one, corpus.rows - len(corpus.erased())))


def warnings(said: dict[str, Any], inverse: InverseCurvature) -> list[str]:
    """Return what a reader of these scores should know of their solve."""
    found = []
    short = [residual for residual, good in zip(said["residual"], said["converged"], strict=True) if not good]
    if short:
        remedy = "a larger method.damping, method.max_iterations or method.dtype=float64"
        if inverse.solver == "lissa":
            remedy = "a larger method.damping, method.depth, method.batch_size or method.repetitions"
        found.append(
            f"{len(short)} of {len(said['residual'])} queries are not solved well: relative residual up to {max(short):.2g}. "
            f"Try {remedy}."
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
    need = 8 * _BLOCKS * size * width + 2 * 4 * size * queries
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
