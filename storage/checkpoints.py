"""Finding a model's checkpoints: their order, steps and learning rates, and a fingerprint of their weights.

Reads what the Hugging Face Trainer leaves behind. Loading weights into a model is the engine's affair.
"""

import bisect
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from storage.locations import Location

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
NOT_WEIGHTS = (
    "optimizer.",
    "scheduler.",
    "rng_state",
    "scaler.",
    "training_args.",
)  # a Trainer's other .pt and .bin files
CONFIGS = ("config.json", "adapter_config.json", "turnover.json")
STATE = "trainer_state.json"
ARGUMENTS = "training_args.bin"
RECORD = "influence.json"  # what launch.InfluenceCallback leaves in a checkpoint: its learning rate, exact
CHUNK = 8 << 20
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")  # a checkpoint's name is that of a folder in the run


@dataclass(frozen=True)
class CheckpointRef:
    """One checkpoint; `how` says where its learning rate comes from."""

    name: str
    path: Location
    step: int
    learning_rate: float | None  # None: not known, which only methods that weigh by it refuse
    how: str  # "given", "logged", "recorded", "interpolated between steps 100 and 200" or "unknown"


def find_checkpoints(
    source: str | Sequence[str | dict[str, Any]],  # a folder, or a list of folders or {path, learning_rate, step}
    learning_rate: float | None = None,  # for those whose folder, or entry in the list, does not say it
    say: Callable[[str], None] = print,  # told which checkpoint is left out, and why
) -> list[CheckpointRef]:
    """Return the checkpoints in order of step.

    A folder with checkpoint-<step> folders gives those, with learning rates from the last one's trainer_state.json
    (interpolated linearly between logged steps); any other folder that holds weights is one checkpoint. The Trainer
    writes trainer_state.json last: where some have it, one without is still being written and is left out.
    FileNotFoundError says what was looked for. ValueError if several checkpoints have no learning rate.
    """
    found = _in_folder(Location.parse(source), say) if isinstance(source, str) else _listed(source, say)
    found = sorted(found, key=lambda ref: ref.step)
    if learning_rate is not None:
        found = [
            replace(ref, learning_rate=learning_rate, how="given") if ref.learning_rate is None else ref
            for ref in found
        ]
    several = [ref for ref in found if ref.learning_rate is None and ref.how != "unknown"]
    if several and len(found) > 1:
        raise ValueError(
            f"the learning rates of {several[0].name} are {several[0].how}, and a checkpoint is weighed by one. Give "
            f"checkpoints.learning_rate."
        )
    unknown = [ref.name for ref in found if ref.learning_rate is None]
    if unknown and len(found) > 1:
        raise ValueError(f"the learning rate of {', '.join(unknown)} is not logged. Give checkpoints.learning_rate.")
    return found


def fingerprint(folder: Path, base: Path | None = None) -> str:
    """Return the sha256 over names and bytes of a folder's weight files and its config, in order of name.

    `base` is the model that an adapter stands on, covered too. FileNotFoundError if either holds no weights.
    """
    files = sorted(path for path in folder.iterdir() if _is_weights(path.name) or path.name in CONFIGS)
    if not any(_is_weights(path.name) for path in files):
        raise FileNotFoundError(f"{folder} holds no weights: looked for {', '.join(f'*{s}' for s in WEIGHTS)}.")
    states = [path.stat() for path in files]
    seen = tuple((path, state.st_size, state.st_mtime_ns) for path, state in zip(files, states, strict=True))
    return _digest(seen, fingerprint(base) if base else "")


@lru_cache(maxsize=256)
def _digest(files: tuple[tuple[Path, int, int], ...], base: str) -> str:
    """Return the sha256 over names, sizes and bytes, then over the base's. A process reads a file again if it changed."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    digest.update(base.encode())
    return digest.hexdigest()


def logged_losses(ref: CheckpointRef) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, loss) that training logged up to a checkpoint, by kind: `loss` of training, `eval_loss`."""
    entries = ref.path.read_json(STATE).get("log_history", []) if ref.path.exists(STATE) else []
    return {
        kind: [(int(entry["step"]), float(entry[kind])) for entry in entries if kind in entry]
        for kind in ("loss", "eval_loss")
    }


def _in_folder(folder: Location, say: Callable[[str], None]) -> list[CheckpointRef]:
    keys = folder.list()
    names = {key.partition("/")[0] for key in keys if "/" in key and _is_weights(key.rpartition("/")[2])}
    steps = {int(name.removeprefix("checkpoint-")): name for name in names if _is_step(name)}
    if not steps:
        return [_single(folder, keys, say)]
    finished = {step: name for step, name in steps.items() if f"{name}/{STATE}" in keys}
    if finished:
        for step in sorted(steps.keys() - finished.keys()):
            say(f"{steps[step]} left out: it has no {STATE}, which a Trainer writes last, so it is not finished")
        steps = finished
    history = _history(folder.read_json(f"{steps[max(steps)]}/{STATE}")) if finished else {}
    found = []
    for step, name in steps.items():
        at = folder.child(name)
        recorded = _recorded(at, say) if f"{name}/{RECORD}" in keys else None
        found.append(CheckpointRef(name, at, step, *(recorded or _rate_at(step, history))))
    return found


def _single(folder: Location, keys: list[str], say: Callable[[str], None]) -> CheckpointRef:
    if not any(_is_weights(key) for key in keys):
        looked = (
            f"checkpoint-<step> folders with weights, and {', '.join(f'*{s}' for s in WEIGHTS)} in the folder itself"
        )
        raise FileNotFoundError(f"{folder.uri} holds no checkpoint: looked for {looked}.")
    state = folder.read_json(STATE) if STATE in keys else {}
    step = int(state.get("global_step", 0))
    name = NOT_IN_NAMES.sub("_", folder.uri.rpartition("/")[2]).lstrip("._-") or "model"
    recorded = _recorded(folder, say) if RECORD in keys else None
    return CheckpointRef(name, folder, step, *(recorded or _rate_at(step, _history(state))))


def _listed(source: Sequence[str | dict[str, Any]], say: Callable[[str], None]) -> list[CheckpointRef]:
    if not source:
        raise FileNotFoundError("checkpoints is an empty list: give a folder, or at least one {path, learning_rate}.")
    refs, steps = [], []
    for number, entry in enumerate(source):
        fields: dict[str, Any] = {"path": entry} if isinstance(entry, str) else entry
        unknown = fields.keys() - {"path", "learning_rate", "step"}
        if unknown or "path" not in fields:
            raise ValueError(
                f"checkpoint {number} has {sorted(fields)}, must have path and may have learning_rate, step."
            )
        folder = Location.parse(fields["path"])
        found = _single(folder, folder.list(), say)
        step = _number(fields, "step", number)
        steps.append(step if step is not None else found.step or _step_in_name(found.name))
        rate = _number(fields, "learning_rate", number)
        known = (found.learning_rate, found.how) if rate is None else (rate, "given")
        refs.append(CheckpointRef(found.name, folder, 0, *known))
    if None in steps:  # the order of the list is all that is known
        steps = list(range(len(refs)))
    return _with_own_names([replace(ref, step=int(step or 0)) for ref, step in zip(refs, steps, strict=True)])


def _number(fields: dict[str, Any], key: str, number: int) -> float | None:
    """Return a number of a listed checkpoint, None without one. ValueError for a value that is not finite or below 0."""
    value = fields.get(key)
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise ValueError(f"{key}={value!r} of checkpoint {number} is not allowed: must be a number of at least 0.")
    return found


def _with_own_names(refs: list[CheckpointRef]) -> list[CheckpointRef]:
    """Return the list with names told apart by their place in it where two folders are called the same."""
    names = [ref.name for ref in refs]
    return [
        ref
        if names.count(ref.name) == 1
        else CheckpointRef(f"{ref.name}-{i}", ref.path, ref.step, ref.learning_rate, ref.how)
        for i, ref in enumerate(refs)
    ]


def _history(state: dict[str, Any]) -> dict[int, float]:
    entries = state.get("log_history", [])
    return {int(entry["step"]): float(entry["learning_rate"]) for entry in entries if "learning_rate" in entry}


def witnesses(checkpoint: Location) -> dict[str, str]:
    """Return the sha256 of the small files that a Trainer writes beside a checkpoint's weights, as far as they are there.

    They hold the training's log and settings: a training into the same folder leaves others.
    """
    names = [name for name in (STATE, ARGUMENTS) if checkpoint.exists(name)]
    return {name: hashlib.sha256(checkpoint.read(name)).hexdigest() for name in names}


def _recorded(checkpoint: Location, say: Callable[[str], None]) -> tuple[float | None, str] | None:
    """Return the learning rate that was recorded while training; no number if groups of parameters had different ones.

    None for the record of an earlier training, whose files beside it are no longer those it was written for.
    """
    record = checkpoint.read_json(RECORD)
    now, then = witnesses(checkpoint), record.get("beside", {})
    if changed := sorted(name for name in now.keys() & then.keys() if now[name] != then[name]):
        say(f"{RECORD} in {checkpoint.uri} left out: {', '.join(changed)} there is of another training than the record")
        return None
    if record["learning_rate"] is not None:
        return float(record["learning_rate"]), "recorded"
    rates = ", ".join(f"{group['learning_rate']:g} for {group['parameters']} weights" for group in record["groups"])
    return None, f"several ({rates})"


def _rate_at(step: int, history: dict[int, float]) -> tuple[float | None, str]:
    """Return (learning rate, how it is known) at a step: logged, between its neighbours, or that of the nearest end."""
    if not history:
        return None, "unknown"
    if step in history:
        return history[step], "logged"
    logged = sorted(history)
    place = bisect.bisect(logged, step)
    if place in (0, len(logged)):
        nearest = logged[0] if place == 0 else logged[-1]
        return history[nearest], f"taken from step {nearest}"
    low, high = logged[place - 1], logged[place]
    share = (step - low) / (high - low)
    return history[low] + share * (history[high] - history[low]), f"interpolated between steps {low} and {high}"


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith(WEIGHTS) and not name.startswith(NOT_WEIGHTS)


def _is_step(name: str) -> bool:
    return name.startswith("checkpoint-") and name.removeprefix("checkpoint-").isdigit()


def _step_in_name(name: str) -> int | None:
    return int(name.removeprefix("checkpoint-")) if _is_step(name) else None
