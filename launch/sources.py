"""What a job starts from: checkpoints with their learning rates, corpora ingested into the run, and the run's identity."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from actors.context import cache_folder, checkpoint_fingerprint
from actors.specs import (
    FOLDERS,
    CheckpointSpec,
    CheckpointVerdict,
    ModelSpec,
    declare,
    first_difference,
)
from engine.checkpoint_choice import choose_checkpoints, logged_since, losses_at
from engine.limits import read_limits
from engine.models import architecture_of
from engine.tasks.contract import Task, encode
from launch.config import Config, CorpusSection
from storage.checkpoints import CheckpointRef, find_checkpoints, logged_losses
from storage.corpus import ingest
from storage.locations import Location
from storage.readers import read_records, source_files
from storage.rows import OWN
from storage.run_format import FORMAT, check_format
from storage.segments import committed_segments

TRAIN = "train"
_EDGE = 1 << 20  # bytes at either end of a source file that its fingerprint covers
_LAST_ASKED = re.compile(rb'^  "(truncation|padding)": \{\n.*?^  \}', re.MULTILINE | re.DOTALL)
_TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")


def model_spec(config: Config, say: Callable[[str], None]) -> tuple[ModelSpec, list[Path]]:
    """Return the model's checkpoints with learning rates and fingerprints, and their local folders.

    Raises ValueError if one of them has other weights than the first: a checkpoint of another architecture.
    """
    given = config.checkpoints.path
    if given is None:
        raise ValueError("checkpoints is missing: name a Trainer output folder, a model folder, or a list")
    found, choice = find_checkpoints(given, config.checkpoints.learning_rate, say), tuple[CheckpointVerdict, ...]()
    if config.checkpoints.choose is not None:
        choice = choose(found, config.checkpoints.choose)
        found = [ref for ref, verdict in zip(found, choice, strict=True) if verdict.kept]
    folders = [c.path.fetch(cache_folder()) for c in found]
    shapes = [architecture_of(folder) for folder in folders]
    for checkpoint, own in zip(found, shapes, strict=True):
        if own != shapes[0]:
            raise ValueError(
                f"checkpoint {checkpoint.name} is of another architecture than {found[0].name}: its weights have other "
                f"names or shapes. All checkpoints of a run must be of one model."
            )
    for verdict in choice:
        loss = "" if verdict.loss is None else f" at loss {verdict.loss:.4g}"
        say(f"{verdict.name}: {'kept' if verdict.kept else 'left out'}{loss}, {verdict.why}")
    for c in found:
        rate = "unknown" if c.learning_rate is None else f"{c.learning_rate:g} ({c.how})"
        say(f"{c.name}: step {c.step}, learning rate {rate}")
    settings = config.task.settings
    specs = tuple(
        CheckpointSpec(
            c.name, c.path.uri, c.step, c.learning_rate, checkpoint_fingerprint(folder, settings, cache_folder())
        )
        for c, folder in zip(found, folders, strict=True)
    )
    g = config.gradients
    return ModelSpec(config.task.name, config.task.settings, specs, g.compute, g.attention, choice), folders


def choose(found: list[CheckpointRef], count: int) -> tuple[CheckpointVerdict, ...]:
    """Return a verdict on every checkpoint, `count` of them kept, from the losses that the last one's log holds.

    The training loss, unless the evaluation loss is logged for more of them. Raises ValueError if no loss is logged.
    """
    steps = [ref.step for ref in found]
    curves = logged_losses(found[-1]).values()
    losses = losses_at(steps, max(curves, key=lambda curve: sum(map(bool, logged_since(steps, curve)))))
    if losses.count(None) == len(losses):
        raise ValueError(
            f"checkpoints.choose={count} is not possible: {found[-1].name} logs no loss at these steps (in the "
            f"log_history of its trainer_state.json). List the checkpoints to use under checkpoints.path instead."
        )
    verdicts = zip(found, losses, choose_checkpoints(losses, count), strict=True)
    return tuple(CheckpointVerdict(ref.name, ref.step, loss, v.kept, v.why) for ref, loss, v in verdicts)


def record_identity(run: Location, model: ModelSpec, folder: Path, task: Task) -> None:
    """Write what the run is about, and a file for every checkpoint; refuse a config that is about something else.

    A run without any row is about nothing yet: what a job that failed before wrote of it is forgotten.
    """
    check_format(run)
    if not holds_rows(run, "corpus"):
        for key in ["manifest.json", *run.list("checkpoints"), *run.list("stages")]:
            run.delete(key)
    settings = {k: v for k, v in model.task_settings.items() if k not in FOLDERS}
    tokenizer = getattr(getattr(task, "tokenizer", None), "name_or_path", None)
    identity = {
        "format": FORMAT,
        "task": model.task,
        "max_tokens": getattr(task, "max_tokens", None),
        "granularity": getattr(task, "granularity", "document"),
        "loss": f"{getattr(task, 'reduction', 'sum')} over an example's tokens",
        "architecture": architecture_of(folder),
        "tokenizer": tokenizer_fingerprint(Path(tokenizer)) if tokenizer else None,
        "settings": settings,
    }
    declare(run, "manifest.json", identity, f"run {run.uri}")
    for checkpoint in model.checkpoints:
        declare(
            run,
            f"checkpoints/{checkpoint.name}.json",
            asdict(checkpoint),
            f"checkpoint {checkpoint.name} of run {run.uri}",
        )


def tokenizer_fingerprint(folder: Path) -> str:
    """Return a hash of the tokenizer's own files, but for what it was last asked to cut or pad, which it saves with them."""
    digest = hashlib.sha256()
    for name in _TOKENIZER:
        if (folder / name).exists():
            digest.update(name.encode() + _LAST_ASKED.sub(rb'  "\1": null', (folder / name).read_bytes()))
    return digest.hexdigest()[:16]


def holds_rows(run: Location, folder: str) -> bool:
    """Tell whether a segment of some corpus below this folder is committed."""
    return any(key.endswith("/segment.json") for key in run.list(folder))


def ingest_set(
    run: Location,
    name: str,
    section: CorpusSection,
    task: Task,
    task_name: str,
    folder: Path,
    say: Callable[[str], None],
    may_commit: Callable[[], None] = lambda: None,  # raises once another driver holds the run
) -> None:
    """Stage 0: stream records once into rows. A set that is already there stays as it is.

    `folder` is the model's: it says what the model can read. A training corpus whose source has grown at its end grows
    likewise, by new segments. Raises SourceChanged, or for queries StageMismatch, if the source has changed otherwise:
    the run's rows would no longer be the corpus's. A source of which no row was kept may change.
    """
    record = {"path": section.path, "split": section.split, "limit": section.limit, "content": content(section.path)}
    if not holds_rows(run, f"corpus/{name}"):
        run.delete(f"stages/ingest-{name}.json")
    grows = name == TRAIN and _may_grow(run, name, record)
    if not grows:
        other = "another run" if name == TRAIN else "another queries.name"
        declare(run, _declared(run, name), record, f"corpus {name!r} of run {run.uri}", other)
    limits = read_limits(Path(getattr(task, "base", None) or folder))
    records = islice(read_records(section.path, split=section.split), section.limit)
    own_task = ":" in task_name

    def rows_of(record: dict) -> list[dict]:
        if own_task:
            refuse_reserved(record)
        return limits.check(encode(task, record))

    report = ingest(run, name, records, rows_of, may_commit=may_commit, grow=grows)
    if grows:
        number = len(run.list(f"stages/grown-{name}"))
        declare(run, f"stages/grown-{name}/{number:06d}.json", record, f"corpus {name!r} of run {run.uri}")
        say(f"{name}: its source has grown by {report.ingested:,} examples; the others are as they were")
    say(
        f"{name}: {report.examples:,} examples of {report.documents:,} records, {report.tokens:,} tokens, "
        f"{report.truncated:,} truncated, {report.chunked:,} chunked"
    )
    if report.repeated:
        say(
            f"warning: {name}: {report.repeated:,} records have the id of an earlier one, the first "
            f"{report.first_repeated!r}: source:{report.first_repeated} names several, a row number one"
        )


def _declared(run: Location, name: str) -> str:
    """Return the key of what the latest ingest of a set read."""
    return max(run.list(f"stages/grown-{name}"), default=f"stages/ingest-{name}.json")


def _may_grow(run: Location, name: str, record: dict[str, Any]) -> bool:
    """Tell whether a finished corpus's source is another than it was, in nothing but content and limit."""
    key = _declared(run, name)
    if not run.exists(key) or not any(segment.ends for segment in committed_segments(run, name)):
        return False
    before = run.read_json(key)
    same = {field: before[field] == record[field] for field in ("content", "limit", "split")}
    return same["split"] and not (same["content"] and same["limit"])


def refuse_reserved(record: dict) -> None:
    """Raise ValueError for a field that a user's own task would find replaced by a column of ours."""
    taken = sorted((OWN.keys() - {"id"}) & record.keys())
    if taken:
        raise ValueError(f"field {taken[0]!r} is a column of every corpus and would be replaced: give it another name")


def content(path: str) -> str:
    """Return a fingerprint of a source: every file's suffix, size, first and last MiB, in the order of their names."""
    location, keys = source_files(path)
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{Path(key).suffix} {location.size(key)}".encode())
        digest.update(location.read_range(key, 0, _EDGE) + location.read_range(key, -_EDGE))
    return digest.hexdigest()[:16]


def same_model(home: Location, run: Location, model: ModelSpec) -> None:
    """Refuse to score against a store whose rows were made of another task or with other weights.

    Raises ValueError naming what differs.
    """
    if not home.exists("manifest.json"):
        raise ValueError(f"run.store={home.uri} holds no run: check the path")
    check_format(home)
    theirs, ours = (where.read_json("manifest.json") for where in (home, run))
    if theirs != ours:
        what, stored, here = first_difference(theirs, ours)
        raise ValueError(f"run.store={home.uri} is about something else: {what} is {stored!r} there, {here!r} here.")
    collected = f"stages/collect-{TRAIN}.json"
    made_with = home.read_json(collected)["model"] if home.exists(collected) else {}
    for setting in ("compute", "attention"):
        here = getattr(model, setting)
        if made_with.get(setting, here) != here:
            raise ValueError(
                f"gradients.{setting}={here!r} is not allowed: the rows of run.store={home.uri} were made with "
                f"{made_with[setting]!r}."
            )
    for checkpoint in model.checkpoints:
        key = f"checkpoints/{checkpoint.name}.json"
        rows_of: dict[str, Any] = home.read_json(key) if home.exists(key) else {}
        if rows_of.get("fingerprint") != checkpoint.fingerprint:
            raise ValueError(
                f"run.store={home.uri} has no rows of checkpoint {checkpoint.name} as it is here: "
                f"fingerprint {rows_of.get('fingerprint', 'none')}, here {checkpoint.fingerprint}."
            )
