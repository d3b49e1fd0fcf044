"""The state of a running solve on disk: the last two, under <folder>/solver.<n>: a SHA-256, then safetensors.

A state is a dataclass of tensors and numbers (engine.solvers); it is named after what is solved, so that one of another
block is never taken for it. The driver's solves keep theirs in journal/<stage>; a solve that is a unit of work keeps its
own under states/<label>/unfinished/<unit>.
"""

import hashlib
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from storage.locations import Location, ObjectConflict

SECONDS = 60.0  # between two saved states
TURN = 300.0  # seconds that a unit works on a solve before it gives it back
_KEPT = 2
_DIGEST = hashlib.sha256().digest_size

State = TypeVar("State")
Result = TypeVar("Result")


class SolverStates:
    """Saves states now and then, and finds the last one again. One solve at a time."""

    def __init__(
        self,
        run: Location,
        folder: str,
        check: Callable[[], None] = lambda: None,  # raises if this driver has lost the run
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._folder, self._check, self.clock = run, folder, check, clock
        self._saved = clock()

    def latest(self, solve: str, kind: type[State], device: torch.device | str = "cpu") -> State | None:
        """Return the last whole state saved of this solve; None if there is none."""
        for number in reversed(self._numbers()):
            try:
                content = self._run.read(self._key(number))
            except FileNotFoundError:
                continue  # deleted since by a worker that was given up and has not ended
            if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
                continue  # damaged: the one before costs a minute
            tensors = safetensors.torch.load(content[_DIGEST:])
            if all(name.startswith(f"{solve}/") for name in tensors):
                found = {f.name: (tensors[f"{solve}/{f.name}"].to(device), f.type) for f in fields(kind)}  # type: ignore[arg-type]
                return kind(**{name: _value(*value) for name, value in found.items()})
        return None

    def saver(self, solve: str) -> Callable[[Any], None]:
        """Return what sees every state of this solve and saves one a minute."""

        def see(state: Any) -> None:
            if self.clock() - self._saved >= SECONDS:
                self.save(solve, state)

        return see

    def save(self, solve: str, state: Any) -> None:
        """Save a state of this solve now."""
        self._check()
        numbers = self._numbers()
        data = safetensors.numpy.save({f"{solve}/{f.name}": _array(getattr(state, f.name)) for f in fields(state)})
        with suppress(ObjectConflict):  # the same worker's: its state serves as well
            self._run.create(self._key(max(numbers, default=-1) + 1), hashlib.sha256(data).digest() + data)
        for number in numbers[: 1 - _KEPT]:
            self._run.delete(self._key(number))
        self._saved = self.clock()

    def clear(self) -> None:
        """Delete all states of the folder: their solves are done."""
        for number in self._numbers():
            self._run.delete(self._key(number))

    def _numbers(self) -> list[int]:
        keys = [key.removeprefix(f"{self._folder}/") for key in self._run.list(self._folder)]
        return sorted(int(key.removeprefix("solver.")) for key in keys if key.startswith("solver."))

    def _key(self, number: int) -> str:
        return f"{self._folder}/solver.{number}"


@dataclass(frozen=True)
class Unfinished:
    """Where a solver stood, and was saved, when its turn was over."""

    state: Any


def take_turn(solver: Generator[Any, None, Result], states: SolverStates, solve: str) -> Result | Unfinished:
    """Run a solver to its end and return its result, unless its turn is over before."""
    began, see = states.clock(), states.saver(solve)
    while True:
        try:
            state = next(solver)
        except StopIteration as end:
            return end.value
        if states.clock() - began >= TURN:
            states.save(solve, state)
            return Unfinished(state)
        see(state)


def _array(value: Any) -> np.ndarray:
    return np.ascontiguousarray(value.cpu() if isinstance(value, Tensor) else value)


def _value(tensor: Tensor, kind: Any) -> Any:
    return tensor.item() if kind in (int, float, bool) else tensor
