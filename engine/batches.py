"""Batches: padded tensors with stable ids, and the plan that groups rows of similar length.

The plan depends on the rows' lengths alone, never on the worker, so the same shard is always cut the same way.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B examples: their ids and the tensors a task's loss reads, each with first dimension B."""

    ids: Tensor  # int64 [B]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; to a GPU it is copied from pinned memory, so that nobody waits for the copy."""
        if device.type == "cpu":
            return Batch(self.ids, {name: tensor.to(device) for name, tensor in self.tensors.items()})
        moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(self.ids, moved)

    def take(self, positions: list[int]) -> "Batch":
        """Return these examples, padded as they are."""
        return Batch(self.ids[positions], {name: tensor[positions] for name, tensor in self.tensors.items()})


def plan_batches(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Return row positions per batch: rows sorted by length, windows of at most token_budget padded tokens.

    A row longer than the budget is a batch of its own. Ties keep row order, so the plan is a function of the lengths.
    """
    if token_budget < 1:
        raise ValueError(f"gradients.token_budget={token_budget} is not allowed: must be at least 1.")
    order = np.argsort(lengths, kind="stable")
    batches, begin = [], 0
    for position in range(1, len(order) + 1):
        full = position < len(order) and (position - begin + 1) * lengths[order[position]] > token_budget
        if full or position == len(order):
            batches.append(order[begin:position])
            begin = position
    return batches


def pad(sequences: list[np.ndarray], value: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return [B, T] with every sequence at the left and `value` behind it."""
    width = max(len(s) for s in sequences)
    out = torch.full((len(sequences), width), value, dtype=dtype)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.as_tensor(np.asarray(sequence).copy(), dtype=dtype)
    return out


def collate_ids(rows: list[dict]) -> Tensor:
    """Return the rows' example ids, int64 [B]; a row without one (a new query) gets −1."""
    return torch.tensor([int(row.get("id", -1)) for row in rows], dtype=torch.int64)
