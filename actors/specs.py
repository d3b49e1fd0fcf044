"""What travels to workers with a stage: plain records that pickle, and that `asdict` turns into the stage's record."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.projection import Projection
from storage.locations import Location


class StageMismatch(OSError):  # noqa: N818  it is what the reader of the message is told
    """A run already holds this stage under other settings."""


@dataclass(frozen=True)
class CheckpointSpec:
    """One moment of the model's training."""

    name: str
    uri: str
    step: int
    learning_rate: float
    fingerprint: str


@dataclass(frozen=True)
class ModelSpec:
    """How a worker gets from a checkpoint's name to a model ready for scoring."""

    task: str
    task_settings: dict[str, Any]
    checkpoints: tuple[CheckpointSpec, ...]  # in order of training
    compute: str  # float32 | bfloat16
    attention: str

    def checkpoint(self, name: str) -> CheckpointSpec:
        return next(c for c in self.checkpoints if c.name == name)

    def record(self) -> dict[str, Any]:
        """Return what a stage under this model records: all but the checkpoints, which have files of their own."""
        return {key: value for key, value in asdict(self).items() if key != "checkpoints"}


@dataclass(frozen=True)
class GradientSpec:
    """Which gradients are taken and in which form."""

    parameters: tuple[str, ...]  # names in model order
    projection: Projection
    norms: bool
    token_budget: int  # padded tokens a batch


@dataclass(frozen=True)
class ScoreSpec:
    """One scoring: a method over a set of rows and a set of queries."""

    label: str
    method: str
    method_settings: dict[str, Any]
    checkpoints: tuple[str, ...]  # those that take part, in order
    queries: str  # name of the query set
    corpus: str  # name of the scored set
    home: str | None  # run that holds corpus and store, if not this one
    stored: bool  # rows come from the store; else they are computed and dropped
    top_k: int
    dense: bool = field(default=False)


def declare_stage(run: Location, name: str, settings: dict[str, Any]) -> None:
    """Write a stage's record, or compare with the one that is there.

    Raises StageMismatch naming the first setting that differs.
    """
    settings = json.loads(json.dumps(settings))
    record = {"settings": settings, "hash": digest(settings)}
    key = f"stages/{name}.json"
    if not run.exists(key):
        run.create_json(key, record)
        return
    before = run.read_json(key)
    if before["hash"] != record["hash"]:
        where, old, new = first_difference(before["settings"], settings)
        raise StageMismatch(
            f"run {run.uri} did stage {name} with {where}={old!r}, this job has {new!r}. Use another run, or {where}={old!r}."
        )


def digest(settings: Any) -> str:
    """Return a hash of plain settings, the same whatever the order of keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def first_difference(a: Any, b: Any, where: str = "") -> tuple[str, Any, Any]:
    """Return the path of the first value in which two unequal records differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return where, a, b
