"""The curvature of the mean training loss as an operator whose products are made by the workers of a pool.

A product is a small stage: the block is sent once, every reduction block gives one float64 partial, lost workers are
handled as in every stage. Reduction blocks follow from the examples alone and their partials are added in a fixed tree, so
the bits are the same whatever the number of workers, their order and their losses.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.pool import Pool
from actors.run_stage import EventSink, run_stage
from actors.units import Receipt, Stage, Unit
from engine.curvature import check_block


class MemoryJournal:
    """Notes nothing: what one product has done is worth nothing without the others."""

    def done(self) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def commit(self, unit_key: str, record: dict[str, Any]) -> None:
        pass


class TreeSum:
    """The sum of numbered partials in the tree of engine.curvature.tree_sum, in whatever order they come.

    A pair of neighbours is added as soon as both are there, so that few partials are held.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int], Any] = {}  # (height, position at that height)

    def add(self, position: int, part: Any) -> None:
        height = 0
        while (neighbour := (height, position ^ 1)) in self._parts:
            other = self._parts.pop(neighbour)
            part = part + other if position % 2 == 0 else other + part
            height, position = height + 1, position // 2
        self._parts[height, position] = part

    def total(self) -> Any:
        """Return the sum; every partial must have come."""
        lowest, *higher = [self._parts[key] for key in sorted(self._parts)]
        for part in higher:
            lowest = part + lowest
        return lowest


class DistributedOperator:
    """An engine.curvature.Operator over a pool."""

    def __init__(
        self,
        pool: Pool,
        settings: dict[str, Any],  # of curvature_unit: model, gradients, curvature
        size: int,  # chosen weights
        ids: np.ndarray,  # int64 [n], the examples of the mean loss, ascending
        block_rows: int,  # examples of a reduction block
        l2: float | Tensor = 0.0,  # of ½ l2 ‖θ‖² in the training objective; (size, 1): each weight has its own
        events: EventSink | None = None,  # where lost workers are written down
    ) -> None:
        self.size, self.ids = size, ids
        self._pool, self._l2, self._events = pool, l2, events
        self._settings = settings | {"ids": pool.share(ids)}
        self._blocks = [
            Unit(f"rows-{first:09d}", {"first": first, "last": min(first + block_rows, len(ids))})
            for first in range(0, len(ids), block_rows)
        ]

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return curvature × block, (size, k) float64. Raises StageStopped where a stage would."""
        check_block(self.size, block)
        units = self._blocks if ids is None else [Unit("batch", {"ids": ids.tolist()})]
        count = len(self.ids if ids is None else ids)
        shared = self._pool.share(block.contiguous().numpy())
        total = summed(self._pool, "curvature", self._settings | {"block": shared}, units, self._events)
        return total / count + self._l2 * block


def summed(
    pool: Pool, function: str, settings: dict[str, Any], units: list[Unit], events: EventSink | None = None
) -> Any:
    """Return the sum of the units' float64 partials, in the tree that their order in the list gives."""
    places, tree = {unit.key: place for place, unit in enumerate(units)}, TreeSum()

    def take(receipt: Receipt) -> None:
        tree.add(places[receipt.unit], torch.tensor(receipt.value))

    run_stage(pool, Stage(function, function, settings, units), MemoryJournal(), events=events, take=take)
    return tree.total()
