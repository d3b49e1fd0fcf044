"""Where a module keeps the examples of a batch: one in each row of its input, or in no order that can be relied on.

An expert of a mixture sees the tokens that are routed to it, of any example, and their number may happen to be the size
of the batch. So rows are held against the same examples run alone, on a few of them, before a batch is trusted.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.batches import Batch

Place = Literal["row", "shared", "mixed"]  # row b is example b's; one row serves all; neither
_EXAMPLES = 3  # held against themselves alone
_NUMBERS = 64  # of a row that are compared
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the row's norm; half precision: 0.05


class MixedRows(Exception):  # noqa: N818  not an error: the batch is then run one example at a time
    """A module's rows are not the examples of the batch."""


def places(modules: Mapping[str, nn.Module], run: Callable[[Batch], object], batch: Batch) -> dict[str, Place]:
    """Return for every module that `run` calls where it keeps the examples. Cost: two forward passes of three examples."""
    count = min(_EXAMPLES, len(batch))
    some = batch.take([i * len(batch) // count for i in range(count)])
    together = _inputs(modules, run, some)
    alone = [_inputs(modules, run, some.take([i])) for i in range(count)]
    names = dict.fromkeys(name for seen in (together, *alone) for name in seen)
    return {name: _place(together.get(name, []), [seen.get(name, []) for seen in alone]) for name in names}


def _place(together: list[list[Tensor]], alone: list[list[list[Tensor]]]) -> Place:
    """Return the place of a module from its calls: rows of the examples together, and of each alone."""
    if any(len(calls) != len(together) or any(len(rows) != 1 for rows in calls) for calls in alone):
        return "mixed"
    found: set[Place] = set()
    for position, rows in enumerate(together):
        own = [calls[position][0] for calls in alone]
        if len(rows) == 1 and all(_alike(rows[0], row) for row in own):
            found.add("shared")
        elif len(rows) == len(own) and all(_alike(row, other) for row, other in zip(rows, own, strict=True)):
            found.add("row")
        else:
            return "mixed"
    return found.pop() if len(found) == 1 else "mixed"


def _alike(row: Tensor, other: Tensor) -> bool:
    if row.shape != other.shape:
        return False
    if not row.is_floating_point():
        return torch.equal(row, other)
    bound, finite = _TOLERANCE.get(row.dtype, 0.05), torch.isfinite(row) & torch.isfinite(other)
    row, other = row[finite].double(), other[finite].double()
    return bool((row - other).norm() <= bound * other.norm())


def _inputs(
    modules: Mapping[str, nn.Module], run: Callable[[Batch], object], batch: Batch
) -> dict[str, list[list[Tensor]]]:
    """Return for every module and call some numbers of every row of its input."""
    seen: dict[str, list[list[Tensor]]] = {}

    def remember(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inner = first_input(args, kwargs)
        seen.setdefault(name, []).append([_some(row) for row in inner[: len(batch) + 1]])

    handles = [m.register_forward_pre_hook(partial(remember, n), with_kwargs=True) for n, m in modules.items()]
    try:
        with torch.no_grad():
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _some(row: Tensor) -> Tensor:
    flat = row.detach().flatten()
    return flat[:: max(1, flat.numel() // _NUMBERS)].clone()


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor that a module is called on."""
    return args[0] if args else next(iter(kwargs.values()))
