"""Turn-over dropout in a training: where the config wants masks, and what is written down of them.

Beside the checkpoints lies turnover_report.json: the learning curves of figure 2 (Kobayashi et al. 2020) and every way in
which training on an example reaches the sub-network that is said never to have seen it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.batches import Batch
from engine.bottleneck import PLACE, TRAINED, add_adapters, head_layers, matching_projections, top_third, widen_head
from engine.counters import derive_key
from engine.duplicates import near_identical
from engine.leaks import leaks
from engine.masks import Masks, duplicate_pairs
from engine.tasks.contract import Task
from engine.training import TrainSettings, freeze
from engine.turnover import TurnOver
from engine.turnover_scores import curves
from launch.turnover_section import TurnOverSection
from storage.checkpoints import find_checkpoints
from storage.locations import Location

REPORT = "turnover_report.json"
_LOOKED_AT = 8  # examples whose leaks are looked at
_ROWS = 64  # of a batch of the curves
_MASKS = 1 << 32


@dataclass(frozen=True)
class Masked:
    """A model that trains with turn-over dropout, and what its report is made from."""

    turnover: TurnOver
    task: Task
    train: list[Batch]  # examples of the learning curves
    test: list[Batch]
    report: Path

    def look(self, settings: TrainSettings) -> None:
        """Begin the report: what leaks in a training with these settings."""
        some = [self.train[0].take(list(range(min(_LOOKED_AT, len(self.train[0])))))] if self.train else []
        found = [asdict(leak) for batch in some for leak in leaks(
            self.turnover, self.task.loss, batch, settings.weight_decay, settings.optimizer == "adamw")]  # fmt: skip
        self._write({"leaks": found, "curves": []})

    def curves(self, at: dict[str, Any]) -> None:
        """Add one point to the learning curves, unless none are asked for."""
        if self.train:
            found = json.loads(self.report.read_text())
            before = [point for point in found["curves"] if point["step"] < at["step"]]  # of a run that was stopped
            point = at | asdict(curves(self.turnover, self.task.loss, self.train, self.test))
            self._write(found | {"curves": [*before, point]})

    def _write(self, found: dict[str, Any]) -> None:
        self.report.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.report, json.dumps(found, indent=1))


def write_whole(file: Path, text: str) -> None:
    """Write a file that is never seen half written, not even by who comes after a kill."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    part.replace(file)


def add_masks(
    model: nn.Module, task: Task, section: TurnOverSection, rows: list[dict], run_seed: int, number: int
) -> TurnOver:
    """Put adapters and masks where the config wants them, in place; `number`: which of the trainings this is.

    Raises ValueError for a model without such places.
    """
    after, before = list(section.after), list(section.before)
    if section.head:
        widen_head(model, section.head, seed=run_seed)
    if section.adapters:
        places = matching_projections(model)
        chosen = top_third(places) if section.layers == "top" else places
        add_adapters(model, section.adapters, chosen or ["*.output.dense"], run_seed)
    if section.adapters or section.head:
        after, before = [PLACE, *after], [*head_layers(model), *before]
    seed = derive_key(run_seed, "turnover", number) % _MASKS
    return TurnOver(model, Masks(section.masks(seed), _duplicates(task, section, rows)), after, before)


def what_trains(model: nn.Module, section: TurnOverSection, settings: TrainSettings, given: bool) -> TrainSettings:
    """Return the settings with adapters and head alone trainable where either is made and the config says nothing."""
    if (section.adapters or section.head) and not given:
        settings = replace(settings, trainable=(TRAINED, *(f"{name}.*" for name in head_layers(model))))
    freeze(model, settings.trainable)
    return settings


def batches(task: Task, rows: list[dict], device: torch.device) -> list[Batch]:
    return [task.collate(rows[begin : begin + _ROWS]).to(device) for begin in range(0, len(rows), _ROWS)]


def _duplicates(task: Task, section: TurnOverSection, rows: list[dict]) -> torch.Tensor | None:
    if not section.duplicates:
        return None
    field = getattr(task, "text_field", None)
    if field is None:
        raise ValueError("train.turnover.duplicates=True needs texts: this task has none. Leave it out.")
    ids = torch.tensor([row["id"] for row in rows])
    return duplicate_pairs(ids, near_identical([str(row[field]) for row in rows]))


def trainings(path: str, say: Callable[[str], None]) -> list[str | dict[str, Any]]:
    """Return the last checkpoint of every training below a folder: of each of its folders seed-<n>, or its own."""
    folder = Location.parse(path)
    found = {key.partition("/")[0] for key in folder.list() if key.startswith("seed-")}
    seeds = sorted(found, key=lambda name: int(name.removeprefix("seed-")))
    each = [folder.child(seed) for seed in seeds] or [folder]
    return [find_checkpoints(one.uri, say=say)[-1].path.uri for one in each]
