"""The sketch of the inverse curvature: its columns by units of work, kept in the run, and what they make of queries.

One sketch serves every query, also new ones. Its matrix G is drawn again from its counters wherever it is needed.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import safetensors.torch
from torch import Tensor

from actors.solve_job import SolveJob, figures_key
from actors.units import Unit
from engine.coordinates import Coordinates, flat_coordinates
from engine.methods.contract import QueryState
from engine.stochastic_solvers import Sketch, sketch_matrix, sketched
from storage.damage import read_checked
from storage.locations import Location


def make_columns(job: SolveJob, sketch: Sketch, largest: float, settings: dict[str, Any]) -> None:
    """Let the workers find the columns that are not there. `settings`: as LiSSA's units have them."""
    units = [Unit(_name(i), {"block": i, "key": _key(job.label, i)}) for i in range(len(sketch.blocks))]
    job.stage(f"sketch-{job.label}", "sketch", settings | {"sketch": sketch, "largest": largest}, units)


def read_columns(
    run: Location, label: str, sketch: Sketch, coordinates: Coordinates
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield S and Gᵀ, float64 (size, k) each, block by block. Raises DamagedObject."""
    sizes = {weight.name: weight.size for weight in coordinates.weights}
    for block in range(len(sketch.blocks)):
        data = read_checked(run, f"sketch-{label}", _name(block), _key(label, block))
        yield coordinates.join(safetensors.torch.load(data)), sketch_matrix(sizes, sketch, block)


def solve_new(run: Location, label: str, state: QueryState, weight: float) -> QueryState:
    """Return new queries' state as scoring takes it, from the sketch that the label's own queries were solved with."""
    sketch = Sketch(**run.read_json(figures_key(label))["sketch"])
    coordinates = flat_coordinates({name: array.shape[1] for name, array in state.arrays.items()})
    x, _ = sketched(coordinates.join(state.arrays), read_columns(run, label, sketch, coordinates))
    arrays = {name: part.float().contiguous() for name, part in coordinates.split(x).items()}
    return replace(state, arrays=arrays, weight=weight)


def described(sketch: Sketch) -> dict[str, Any]:
    """Return what the figures say of a sketch: all that drawing its matrix again needs."""
    return {"sketch": asdict(sketch)}


def _name(block: int) -> str:
    return f"columns-{block:04d}"


def _key(label: str, block: int) -> str:
    return f"states/{label}/sketch/{_name(block)}.safetensors"
