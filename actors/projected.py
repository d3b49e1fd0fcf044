"""The solve on stored rows: (GᵀG/n + λI)⁻¹ q with one matrix for all queries, kept in the run for new ones."""

from dataclasses import asdict, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from actors.operator import summed
from actors.plan import shard_units
from actors.solve_job import SolveJob, figures
from actors.states import SavedState
from engine.coordinates import Coordinates, flat_coordinates
from engine.influence import projected_solve
from engine.methods.contract import QueryState
from engine.methods.inverse import InverseCurvature
from engine.solvers import finish, largest_eigenvalue, relative, solution
from storage.damage import read_checked
from storage.locations import Location, ObjectRecord

_GRAM = "gram"  # its unit in the solve's journal


class _Matrix:
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size = matrix, len(matrix)

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        return self.matrix @ block


def gram_key(label: str) -> str:
    return f"states/{label}/gram.safetensors"


def make_gram(job: SolveJob) -> None:
    """Leave GᵀG of all stored rows in the run, unless it is there."""
    key = gram_key(job.label)
    if _GRAM in job.notes.done():
        return
    settings = job.settings | {"arrays": sorted(job.sizes)}
    total = summed(job.pool, "gram", settings, shard_units(job.pieces, job.score.corpus), job.events)
    gram = total[:-1].view(sum(job.sizes.values()), -1).contiguous()
    data = safetensors.torch.save({"gram": gram, "count": total[-1].clone()})
    job.check()
    job.run.delete(key)  # of a driver that was killed here, or damaged
    job.run.create(key, data)
    job.notes.commit(_GRAM, {"objects": [asdict(ObjectRecord.of(key, data))]})


def solve_rows(job: SolveJob, asked: SavedState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the solved arrays, float32 [Q, columns], and the figures of all queries."""
    make_gram(job)
    gram, count = read_gram(job.run, job.label)
    mean, damping = gram / count, damping_of(gram, count, job.inverse)
    queries = asked.window(0, len(asked.rest.losses))
    coordinates = _columns(queries)
    b = coordinates.join(queries.arrays)
    x = projected_solve(gram, count, b.T, damping).T
    left = relative(b - mean @ x - damping * x, b)
    largest = finish(largest_eigenvalue(_Matrix(mean), seed=job.seed))
    found = solution(x, b, left, job.inverse.tolerance, 1, damping, largest)
    arrays = {name: part.float().contiguous() for name, part in coordinates.split(x).items()}
    one = figures("projected", count, found)
    return arrays, one | {"iterations": [1] * len(queries.losses)}


def solve_new(run: Location, label: str, inverse: InverseCurvature, state: QueryState, weight: float) -> QueryState:
    """Return new queries' state as scoring takes it, from the matrix that the label's own queries were solved with."""
    gram, count = read_gram(run, label)
    coordinates = _columns(state)
    x = projected_solve(gram, count, coordinates.join(state.arrays).T, damping_of(gram, count, inverse)).T
    arrays = {name: part.float().contiguous() for name, part in coordinates.split(x).items()}
    return replace(state, arrays=arrays, weight=weight)


def _columns(state: QueryState) -> Coordinates:
    """Return the rows' arrays side by side, as gram_unit puts them: by name."""
    return flat_coordinates({name: array.shape[1] for name, array in sorted(state.arrays.items())})


def read_gram(run: Location, label: str) -> tuple[Tensor, int]:
    """Return GᵀG, (D, D) float64, and how many rows are in it. Raises DamagedObject."""
    found = safetensors.torch.load(read_checked(run, f"solve-{label}", _GRAM, gram_key(label)))
    return found["gram"], int(found["count"])


def damping_of(gram: Tensor, count: int, inverse: InverseCurvature) -> float:
    """Return λ, absolute. Raises FloatingPointError for rows that are all 0."""
    mean = float(torch.trace(gram)) / count / len(gram)
    if mean == 0:
        raise FloatingPointError("the stored rows are all 0: check gradients.modules and the corpus")
    return inverse.absolute(mean)
