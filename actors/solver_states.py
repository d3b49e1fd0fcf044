"""The state of a running solve on disk: the last two, as safetensors under journal/<stage>/solver.<n>.

A state is a dataclass of tensors and numbers (engine.solvers); it is named after what is solved, so that one of another
block is never taken for it.
"""

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import safetensors.torch
from torch import Tensor

from storage.locations import Location

SECONDS = 60.0  # between two saved states
_KEPT = 2

State = TypeVar("State")


class SolverStates:
    """Saves states now and then, and finds the last one again. One solve at a time."""

    def __init__(
        self,
        run: Location,
        stage: str,
        check: Callable[[], None] = lambda: None,  # raises if this driver has lost the run
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._folder, self._check, self._clock = run, f"journal/{stage}", check, clock
        self._saved = clock()

    def latest(self, solve: str, kind: type[State]) -> State | None:
        """Return the last state saved of this solve; None if there is none."""
        for number in reversed(self._numbers()):
            tensors = safetensors.torch.load(self._run.read(self._key(number)))
            if all(name.startswith(f"{solve}/") for name in tensors):
                return kind(**{f.name: _value(tensors[f"{solve}/{f.name}"], f.type) for f in fields(kind)})  # type: ignore[arg-type]
        return None

    def saver(self, solve: str) -> Callable[[Any], None]:
        """Return what sees every state of this solve and saves one a minute."""

        def see(state: Any) -> None:
            if self._clock() - self._saved >= SECONDS:
                self._save(solve, state)
                self._saved = self._clock()

        return see

    def clear(self) -> None:
        """Delete all of the stage's states: their solves are done."""
        for number in self._numbers():
            self._run.delete(self._key(number))

    def _save(self, solve: str, state: Any) -> None:
        self._check()
        numbers = self._numbers()
        arrays = {f"{solve}/{f.name}": np.ascontiguousarray(getattr(state, f.name)) for f in fields(state)}
        data = safetensors.numpy.save(arrays)
        self._run.create(self._key(max(numbers, default=-1) + 1), data)
        for number in numbers[: 1 - _KEPT]:
            self._run.delete(self._key(number))

    def _numbers(self) -> list[int]:
        keys = [key.removeprefix(f"{self._folder}/") for key in self._run.list(self._folder)]
        return sorted(int(key.removeprefix("solver.")) for key in keys if key.startswith("solver."))

    def _key(self, number: int) -> str:
        return f"{self._folder}/solver.{number}"


def _value(tensor: Tensor, kind: Any) -> Any:
    return tensor.item() if kind in (int, float, bool) else tensor
