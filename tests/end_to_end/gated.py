"""A task that writes down what is computed, and that a test can make wait inside a unit."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.tasks.text_classification import TextClassification


class Gated(TextClassification):
    """Text classification. The folder `gate` decides and keeps the books:

    hold         holds a row and a number n: the loss of that row waits, once it has been asked for n times, until the
                 file is gone
    held.<pid>   that process waits
    tally        a line for every batch: process, torch threads, the checkpoint's mark, ids
    """

    def __init__(self, gate: str, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.gate = Path(gate)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return super().loss(model, batch)  # a look at the model, no unit's work
        self.note(model, batch)
        return super().loss(model, batch)

    def note(self, model: nn.Module, batch: Batch) -> None:
        """Write the batch down, and wait if its row is held."""
        ids = batch.ids.tolist()
        mark = f"{float(next(model.parameters()).detach().double().sum()):.6f}"
        with (self.gate / "tally").open("a") as file:
            file.write(f"{os.getpid()} {torch.get_num_threads()} {mark} {','.join(map(str, ids))}\n")
        self.wait(ids)

    def wait(self, ids: list[int]) -> None:
        hold = self.gate / "hold"
        if not hold.exists():
            return
        row, times = map(int, hold.read_text().split())
        if row in ids and seen(self.gate, row) > times:
            (self.gate / f"held.{os.getpid()}").touch()
            while hold.exists():
                time.sleep(0.02)


class GatedForward(Gated):
    """The same for methods whose units are forward passes alone."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.note(model, batch)
        return TextClassification.loss(self, model, batch)


def tally(gate: Path) -> list[tuple[int, int, str, list[int]]]:
    """Return process, threads, checkpoint and ids of every batch so far."""
    lines = [line.split() for line in (gate / "tally").read_text().splitlines()]
    return [(int(pid), int(threads), mark, [int(i) for i in ids.split(",")]) for pid, threads, mark, ids in lines]


def seen(gate: Path, row: int) -> int:
    return sum(row in ids for _, _, _, ids in tally(gate))
