"""What travels to workers with a stage: plain records that pickle, and that `asdict` turns into the stage's record."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.projection import Projection
from engine.tasks.contract import BUILT_IN
from storage.locations import Location, ObjectConflict, to_json

FOLDERS = ("tokenizer", "model", "base")  # settings of a built-in task that are folders
_PLACES = ("uri", "path", "home")  # of a checkpoint, a source, another run
_SIZES = ("token_budget",)  # of a batch: they change no number beyond rounding


class StageMismatch(OSError):  # noqa: N818  it is what the reader of the message is told
    """A run already holds this stage under other settings."""


@dataclass(frozen=True)
class CheckpointSpec:
    """One moment of the model's training."""

    name: str
    uri: str
    step: int
    learning_rate: float | None  # None: not known
    fingerprint: str


@dataclass(frozen=True)
class CheckpointVerdict:
    """Whether a checkpoint that was found takes part, and why: what `checkpoints.choose` decided."""

    name: str
    step: int
    loss: float | None  # mean of what was logged since the checkpoint before; None: nothing was
    kept: bool
    why: str


@dataclass(frozen=True)
class ModelSpec:
    """How a worker gets from a checkpoint's name to a model ready for scoring."""

    task: str
    task_settings: dict[str, Any]
    checkpoints: tuple[CheckpointSpec, ...]  # in order of training
    compute: str  # float32 | bfloat16
    attention: str
    choice: tuple[CheckpointVerdict, ...] = ()  # on every checkpoint found; empty: all take part

    def checkpoint(self, name: str) -> CheckpointSpec:
        return next(c for c in self.checkpoints if c.name == name)

    def record(self) -> dict[str, Any]:
        """Return what a stage under this model records: all but the checkpoints, which have files of their own."""
        return {key: value for key, value in asdict(self).items() if key not in ("checkpoints", "choice")}


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


@dataclass(frozen=True)
class CurvatureSpec:
    """Which curvature a worker multiplies with, over which examples."""

    checkpoint: str
    kind: str  # gauss-newton | hessian
    dtype: str  # of the products
    corpus: str  # name of the set that the examples are of
    home: str | None  # run that holds it, if not this one


def declare_stage(run: Location, name: str, settings: dict[str, Any], other: str = "another run") -> None:
    """Write a stage's record, or compare with the one that is there. Raises StageMismatch if they differ."""
    declare(run, f"stages/{name}.json", settings, f"stage {name} of run {run.uri}", other)


def declare(run: Location, key: str, settings: dict[str, Any], what: str, other: str = "another run") -> None:
    """Create a record with its hash, or compare with the one that is there.

    Only what things are is compared. Where they lie may change, and on other devices the batch size: the record then says
    what holds now. Raises StageMismatch naming the first value that differs, and what `other` thing to use for both to be
    kept.
    """
    settings = json.loads(json.dumps(settings))
    record = {**settings, "hash": digest(settings)}
    try:
        run.create_json(key, record)
        return
    except ObjectConflict:
        pass  # it is there, by an earlier job or one that runs beside this one
    before = run.read_json(key)
    stored, asked = identity({k: v for k, v in before.items() if k != "hash"}), identity(settings)
    if stored != asked:
        where, old, new = first_difference(stored, asked)
        raise StageMismatch(
            f"{what} was made with {where}={old!r}, this job has {new!r}. Use {other}, or restore that value."
        )
    if before != record:
        run.replace(key, to_json(record))


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what only says where things lie, whose fingerprints stand beside it or in the manifest, and
    without the batch size that suited a device.
    """
    kept = {key: value for key, value in record.items() if key not in _PLACES + _SIZES}
    if isinstance(kept.get("gradients"), dict):
        kept["gradients"] = {key: value for key, value in kept["gradients"].items() if key not in _SIZES}
    model = kept.get("model")
    if isinstance(model, dict) and model.get("task") in BUILT_IN:
        settings = {key: value for key, value in model["task_settings"].items() if key not in FOLDERS}
        kept["model"] = model | {"task_settings": settings}
    return kept


def digest(settings: dict[str, Any]) -> str:
    """Return a hash of what a record says, the same whatever the order of keys and wherever things lie."""
    return hashlib.sha256(json.dumps(identity(settings), sort_keys=True).encode()).hexdigest()[:16]


def first_difference(a: Any, b: Any, where: str = "") -> tuple[str, Any, Any]:
    """Return the path of the first value, in the order of `b`, in which two unequal records differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*b, *a]):
            if a.get(key) != b.get(key):
                return first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return where, a, b
