"""Solvers that need curvature products alone: they run on the driver, their products on the workers.

λ_max, the scale of random batches and every solved block of queries are noted in the stage's journal. A repetition of
LiSSA, and a block of a sketch's columns, are units of work. Whatever is at work saves its state once a minute: a killed
driver or worker goes on to the same bits.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from actors.operator import DistributedOperator
from actors.plan import sampled_ids
from actors.sketch import described, make_columns, read_columns
from actors.solve_job import SolveJob, figures, right_sides
from actors.solver_states import SolverStates
from actors.states import SavedState
from actors.units import Unit
from engine.coordinates import flat_coordinates
from engine.methods.inverse import STATES, start
from engine.solvers import PowerState, Solution, finish, largest_eigenvalue
from engine.stochastic_solvers import Lissa, Sketch, batch_scale, lissa_solution, sketch_solution


class BlockSolver:
    """Solves one block of queries after another."""

    def __init__(self, job: SolveJob) -> None:
        inverse = job.inverse
        self.job, self.inverse = job, inverse
        self.ids = sampled_ids(job.corpus, inverse.rows, job.seed)
        self.coordinates = flat_coordinates(job.sizes)
        self.operator = DistributedOperator(
            job.pool, job.settings, self.coordinates.size, self.ids, job.block_rows, inverse.l2, job.events
        )
        self.states = SolverStates(job.run, f"journal/solve-{job.label}", job.check)
        self._done = dict(job.notes.done())

    def solve(self, asked: SavedState) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the solved arrays, float32 [Q, O·I], and the figures of all queries."""
        queries, largest = len(asked.rest.losses), self.largest()
        starts = range(0, queries, self.inverse.query_block)
        if self.inverse.solver == "lissa":
            lissa = self.lissa(largest)
            self.repeat(lissa, largest, queries)
            blocks = [self.mean(asked, first, lissa, largest) for first in starts]
        elif self.inverse.solver == "sketch":
            sketch = self.sketch()
            blocks = [self.estimate(asked, first, sketch, largest) for first in starts]
        else:
            blocks = [self.descend(asked, first, largest) for first in starts]
        self.states.clear()
        parts = [safetensors.torch.load(self.job.run.read(self._key(first))) for first in starts]
        return {name: torch.cat([part[name] for part in parts]) for name in self.job.sizes}, joined(blocks)

    def largest(self) -> float:
        """Return λ_max. Raises FloatingPointError if the curvature is 0."""

        def find() -> dict[str, Any]:
            state = self.states.latest("largest", PowerState)
            solver = largest_eigenvalue(self.operator, seed=self.job.seed, state=state)
            return {"value": finish(solver, self.states.saver("largest"))}

        value = self._noted("largest", find)["value"]
        if value == 0:
            raise FloatingPointError("the curvature is 0 in every direction: check gradients.modules and the corpus")
        return value

    def descend(self, asked: SavedState, first: int, largest: float) -> Mapping[str, Any]:
        """Solve one block and return its figures."""
        name = self._name(first)

        def find() -> dict[str, Any]:
            state = self.states.latest(name, STATES[self.inverse.solver])
            solver = start(self.inverse, self.operator, self._right(asked, first), largest, state)
            return self._write(first, finish(solver, self.states.saver(name)))

        return self._noted(name, find)

    def scale(self, largest: float) -> float:
        """Return the largest λ_max of some random batches, at least that of all examples with λ."""

        def find() -> dict[str, Any]:
            found = batch_scale(self.operator, torch.from_numpy(self.ids), self.inverse.batch, self.job.seed)
            return {"value": max(found, largest)}

        return self._noted("scale", find)["value"]

    def lissa(self, largest: float) -> Lissa:
        """Return LiSSA's settings, the scale that was asked for or one that its batches do not diverge with."""
        least = largest + self.inverse.absolute(largest)
        scale = self.inverse.scale or max(self.scale(largest), least)
        return self.inverse.lissa(largest, scale, self.job.seed)

    def sketch(self) -> Sketch:
        """Return the sketch's settings, its columns being there."""
        largest = self.largest()
        sketch = self.inverse.sketch(largest, self.scale(largest), self.job.seed)
        make_columns(self.job, sketch, largest, self._local())
        return sketch

    def repeat(self, lissa: Lissa, largest: float, queries: int) -> None:
        """Run every repetition for every block of queries as a stage of the job."""
        width = self.inverse.query_block
        settings = self._local() | {"lissa": lissa, "largest": largest}
        units = [
            Unit(
                f"{self._name(first)}-{repetition:03d}",
                {"first": first, "last": min(first + width, queries), "repetition": repetition,
                 "key": self._repetition(first, repetition)},
            )
            for first in range(0, queries, width)
            for repetition in range(lissa.repetitions)
        ]  # fmt: skip
        self.job.stage(f"lissa-{self.job.label}", "lissa", settings, units)

    def mean(self, asked: SavedState, first: int, lissa: Lissa, largest: float) -> Mapping[str, Any]:
        """Write the mean of one block's repetitions and return its figures."""

        def find() -> dict[str, Any]:
            keys = [self._repetition(first, repetition) for repetition in range(lissa.repetitions)]
            estimates = (safetensors.torch.load(self.job.run.read(key))["x"] for key in keys)
            found = lissa_solution(self.operator, self._right(asked, first), lissa, estimates, largest)
            return self._write(first, found) | {"scale": lissa.scale}

        return self._noted(self._name(first), find)

    def estimate(self, asked: SavedState, first: int, sketch: Sketch, largest: float) -> Mapping[str, Any]:
        """Write what the sketch makes of one block of queries and return its figures."""

        def find() -> dict[str, Any]:
            blocks = read_columns(self.job.run, self.job.label, sketch, self.coordinates)
            found = sketch_solution(self.operator, self._right(asked, first), sketch, blocks, largest)
            return self._write(first, found) | described(sketch)

        return self._noted(self._name(first), find)

    def _local(self) -> dict[str, Any]:
        """Return what units are told that draw their own batches."""
        return self.job.settings | {
            "ids": self.job.pool.share(self.ids),
            "l2": self.inverse.l2,
            "label": self.job.label,
        }

    def _right(self, asked: SavedState, first: int) -> Tensor:
        return self.coordinates.join(right_sides(asked, first, self.inverse.query_block))

    def _write(self, first: int, solution: Solution) -> dict[str, Any]:
        arrays = {name: part.float().contiguous() for name, part in self.coordinates.split(solution.x).items()}
        self.job.check()
        self.job.run.delete(self._key(first))  # of a driver that was killed here
        self.job.run.create(self._key(first), safetensors.torch.save(arrays))
        return figures(self.inverse.solver, len(self.ids), solution)

    def _noted(self, name: str, find: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """Return the record of this piece of the solve: found and noted now, unless it was before."""
        if name not in self._done:
            began = time.perf_counter()
            found = find()
            self._done[name] = {"found": found, "seconds": round(time.perf_counter() - began, 3)}
            self.job.notes.commit(name, dict(self._done[name]))
        return self._done[name]["found"]

    def _name(self, first: int) -> str:
        return f"block-{first:06d}"

    def _key(self, first: int) -> str:
        return f"states/{self.job.label}/solved/{self._name(first)}.safetensors"

    def _repetition(self, first: int, repetition: int) -> str:
        return f"states/{self.job.label}/lissa/{self._name(first)}-{repetition:03d}.safetensors"


def joined(blocks: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of all queries from those of their blocks: iterations become one number per query as well."""
    lists = [{**block, "iterations": [block["iterations"]] * len(block["residual"])} for block in blocks]
    return {
        name: [number for one in lists for number in one[name]] if isinstance(value, list) else value
        for name, value in lists[0].items()
    }
