"""Solvers that need curvature products alone: they run on the driver, their products on the workers.

λ_max, LiSSA's scale and every solved block of queries are noted in the stage's journal; the solver at work saves its state
once a minute. A repetition of LiSSA is a unit of work like any other. A killed driver goes on to the same bits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from actors.operator import DistributedOperator
from actors.plan import sampled_ids
from actors.solve_job import SolveJob, figures
from actors.solver_states import SolverStates
from actors.units import Unit
from engine.coordinates import flat_coordinates
from engine.methods.contract import QueryState
from engine.methods.inverse import STATES, start
from engine.solvers import PowerState, Solution, finish, largest_eigenvalue
from engine.stochastic_solvers import Lissa, batch_scale, lissa_solution


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
        self.states = SolverStates(job.run, f"solve-{job.label}", job.check)
        self._done = dict(job.notes.done())

    def solve(self, queries: QueryState) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the solved arrays, float32 [Q, O·I], and the figures of all queries."""
        starts = range(0, len(queries.losses), self.inverse.query_block)
        largest = self.largest()
        if self.inverse.solver == "lissa":
            lissa = self.lissa(largest)
            self.repeat(lissa, largest, len(queries.losses))
            blocks = [self.mean(queries, first, lissa, largest) for first in starts]
        else:
            blocks = [self.descend(queries, first, largest) for first in starts]
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

    def descend(self, queries: QueryState, first: int, largest: float) -> Mapping[str, Any]:
        """Solve one block and return its figures."""
        name = self._name(first)

        def find() -> dict[str, Any]:
            state = self.states.latest(name, STATES[self.inverse.solver])
            solver = start(self.inverse, self.operator, self._right(queries, first), largest, state)
            return self._write(first, finish(solver, self.states.saver(name)))

        return self._noted(name, find)

    def lissa(self, largest: float) -> Lissa:
        """Return LiSSA's settings, the scale that was asked for or one that its batches do not diverge with."""
        ids, inverse = torch.from_numpy(self.ids), self.inverse

        def find() -> dict[str, Any]:
            found = batch_scale(self.operator, ids, inverse.batch_size, self.job.seed)
            return {"value": max(found, largest + inverse.absolute(largest))}

        scale = inverse.scale or self._noted("scale", find)["value"]
        return inverse.lissa(largest, scale, self.job.seed)

    def repeat(self, lissa: Lissa, largest: float, queries: int) -> None:
        """Run every repetition for every block of queries as a stage of the job."""
        width = self.inverse.query_block
        settings = self.job.settings | {
            "ids": self.job.pool.share(self.ids), "lissa": lissa, "largest": largest, "l2": self.inverse.l2,
            "label": self.job.label,
        }  # fmt: skip
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

    def mean(self, queries: QueryState, first: int, lissa: Lissa, largest: float) -> Mapping[str, Any]:
        """Write the mean of one block's repetitions and return its figures."""

        def find() -> dict[str, Any]:
            keys = [self._repetition(first, repetition) for repetition in range(lissa.repetitions)]
            estimates = [safetensors.torch.load(self.job.run.read(key))["x"] for key in keys]
            found = lissa_solution(self.operator, self._right(queries, first), lissa, estimates, largest)
            return self._write(first, found) | {"scale": lissa.scale}

        return self._noted(self._name(first), find)

    def _right(self, queries: QueryState, first: int) -> Tensor:
        window = slice(first, first + self.inverse.query_block)
        return self.coordinates.join({name: queries.arrays[name][window] for name in self.job.sizes})

    def _write(self, first: int, solution: Solution) -> dict[str, Any]:
        arrays = {name: part.float().contiguous() for name, part in self.coordinates.split(solution.x).items()}
        self.job.check()
        self.job.run.delete(self._key(first))  # of a driver that was killed here
        self.job.run.create(self._key(first), safetensors.torch.save(arrays))
        return figures(self.inverse.solver, len(self.ids), solution)

    def _noted(self, name: str, find: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """Return the record of this piece of the solve: found and noted now, unless it was before."""
        if name not in self._done:
            self._done[name] = {"found": find()}
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
