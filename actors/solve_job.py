"""What the stage between prepare and score is given, where it leaves things, and what it says of its solutions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from actors.pool import Pool
from actors.run_stage import EventSink
from actors.specs import CurvatureSpec, GradientSpec, ModelSpec, ScoreSpec
from actors.states import SavedState
from actors.units import Unit
from engine.methods.inverse import InverseCurvature
from engine.solvers import Solution
from storage.corpus import Corpus
from storage.locations import Location


class Notes(Protocol):
    """A stage's journal, as the driver uses it for what it does itself."""

    def done(self) -> Mapping[str, Mapping[str, Any]]: ...
    def commit(self, unit: str, record: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class SolveJob:
    """What is solved, and with what."""

    run: Location
    pool: Pool
    notes: Notes  # of the stage solve-<label>
    stage: Callable[[str, str, dict[str, Any], list[Unit]], None]  # runs one: name, function, settings, units
    check: Callable[[], None]  # raises if this driver has lost the run
    events: EventSink
    say: Callable[[str], None]
    model: ModelSpec
    gradients: GradientSpec
    score: ScoreSpec
    inverse: InverseCurvature
    corpus: Corpus
    sizes: dict[str, int]  # numbers of every array of a query, in the model's order
    pieces: list[dict[str, Any]]  # shards of the corpus
    block_rows: int  # examples of a reduction block
    chosen: tuple[Tensor, Tensor] | None  # candidates and probes of the state, if the method has any

    @property
    def label(self) -> str:
        return self.score.label

    @property
    def checkpoint(self) -> str:
        return self.score.checkpoints[0]

    @property
    def seed(self) -> int:
        return self.gradients.projection.seed

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the units of curvature.py are told."""
        score, inverse = self.score, self.inverse
        spec = CurvatureSpec(self.checkpoint, inverse.kind, inverse.dtype, score.corpus, score.home)
        return {"model": self.model, "gradients": self.gradients, "curvature": spec}


def figures_key(label: str) -> str:
    return f"states/{label}/figures.json"


def right_sides(asked: SavedState, first: int, width: int) -> dict[str, Tensor]:
    """Return the gradients of some queries, name -> [k, numbers]; only theirs are read."""
    return asked.window(first, min(first + width, len(asked.rest.losses))).arrays


def figures(solver: str, examples: int, solution: Solution) -> dict[str, Any]:
    """Return what a solution says of itself, JSON-ready: what it was made with, and lists of one number per query."""
    error = solution.standard_error
    return {
        "solver": solver,
        "examples": examples,
        "damping": solution.damping,
        "largest": solution.largest,
        "iterations": solution.iterations,
        "residual": solution.residual.tolist(),
        "converged": solution.converged.tolist(),
        "identity": solution.identity.tolist(),
        "standard_error": None if error is None else (error.norm(dim=0) / solution.x.norm(dim=0)).tolist(),
    }
