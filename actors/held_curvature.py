"""What a worker keeps for curvature products: the model's curvature, and batches with their recorded frozen layers."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batches import Batch, plan_batches
from engine.curvature import Curvature, Examples, LocalOperator
from engine.prefix import Recording, recorded_bytes
from engine.tasks.contract import Task

HELD_BYTES = 1 << 30  # of batches and recordings; blocks beyond it are read and computed in full each time

Recorded = tuple[Batch, Recording | None]


class HeldCurvature:
    """Curvature products over examples given by id. What is held changes their time and no bit."""

    def __init__(
        self,
        curvature: Curvature,
        task: Task,
        read: Callable[[np.ndarray], list[dict]],  # ids -> their rows
        token_budget: int,  # padded tokens a batch
        device: torch.device,
    ) -> None:
        self.curvature, self.device = curvature, device
        self._task, self._read, self._token_budget = task, read, token_budget
        self._blocks: dict[tuple[int, int], list[Recorded]] = {}
        self._left = HELD_BYTES

    def total(self, ids: np.ndarray, block: Tensor) -> Tensor:
        """Return Σ_z curvature of ℓ_z × block over these examples, all different, (size, k) float64 on the CPU."""
        return self.curvature.total(self._recorded(ids), block.to(self.device)).cpu()

    def local(self, ids: np.ndarray, l2: float | Tensor) -> LocalOperator:
        """Return the operator whose batches are drawn from these examples, which are read now."""
        rows = {int(row["id"]): row for row in self._read(ids)}

        def gather(chosen: Tensor) -> Sequence[Batch]:
            return list(self._batches([rows[i] for i in chosen.tolist()]))

        return LocalOperator(self.curvature, Examples(torch.from_numpy(ids), (), gather), l2)

    def batch_total(self, ids: np.ndarray, block: Tensor) -> Tensor:
        """Return the same sum as `total` over a passing batch, whose ids may repeat; nothing of it is held."""
        found, places = np.unique(ids, return_inverse=True)
        rows = self._read(found)
        batches = ((batch, None) for batch in self._batches([rows[i] for i in places]))
        return self.curvature.total(batches, block.to(self.device)).cpu()

    def _recorded(self, ids: np.ndarray) -> Iterator[Recorded]:
        """Yield a reduction block's batches, from memory if they are held there."""
        key = (int(ids[0]), int(ids[-1]))
        if key in self._blocks:
            yield from self._blocks[key]
            return
        held: list[Recorded] | None = []
        for batch in self._batches(self._read(ids)):
            recording = self.curvature.record(batch) if held is not None else None
            size = sum(tensor.nbytes for tensor in batch.tensors.values()) + recorded_bytes(recording or {})
            if held is not None and size <= self._left:
                self._left -= size
                held.append((batch, recording))
            else:
                held = None
            yield batch, recording
        if held is not None:
            self._blocks[key] = held

    def _batches(self, rows: list[dict]) -> Iterator[Batch]:
        for positions in plan_batches(np.array([row["length"] for row in rows]), self._token_budget):
            yield self._task.collate([rows[i] for i in positions]).to(self.device)
