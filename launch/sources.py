"""What a job starts from: checkpoints with their learning rates, corpora ingested into the run, and the run's identity."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from actors.specs import CheckpointSpec, ModelSpec, declare, first_difference
from engine.limits import read_limits
from engine.models import architecture_of
from engine.tasks.contract import Task, encode
from launch.config import Config, CorpusSection
from storage.checkpoints import find_checkpoints, fingerprint
from storage.corpus import ingest
from storage.locations import Location
from storage.readers import read_records, source_files
from storage.rows import OWN

TRAIN = "train"
_EDGE = 1 << 20  # bytes at either end of a source file that its fingerprint covers
_TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")


def cache_folder() -> Path:
    """Return where remote checkpoints are copied to on this machine."""
    return Path(tempfile.gettempdir()) / "influence-engine"


def model_spec(config: Config, say: Callable[[str], None]) -> tuple[ModelSpec, list[Path]]:
    """Return the model's checkpoints with learning rates and fingerprints, and their local folders.

    Raises ValueError if one of them has other weights than the first: a checkpoint of another architecture.
    """
    given = config.checkpoints.path
    if given is None:
        raise ValueError("checkpoints is missing: name a Trainer output folder, a model folder, or a list")
    found = find_checkpoints(given, config.checkpoints.learning_rate)
    folders = [c.path.fetch(cache_folder()) for c in found]
    shapes = [architecture_of(folder) for folder in folders]
    for checkpoint, own in zip(found, shapes, strict=True):
        if own != shapes[0]:
            raise ValueError(
                f"checkpoint {checkpoint.name} is of another architecture than {found[0].name}: its weights have other "
                f"names or shapes. All checkpoints of a run must be of one model."
            )
    for c in found:
        rate = "unknown" if c.learning_rate is None else f"{c.learning_rate:g} ({c.how})"
        say(f"{c.name}: step {c.step}, learning rate {rate}")
    specs = tuple(
        CheckpointSpec(c.name, c.path.uri, c.step, c.learning_rate, fingerprint(folder))
        for c, folder in zip(found, folders, strict=True)
    )
    g = config.gradients
    return ModelSpec(config.task.name, config.task.settings, specs, g.compute, g.attention), folders


def record_identity(run: Location, model: ModelSpec, folder: Path, task: Task) -> None:
    """Write what the run is about, and a file for every checkpoint; refuse a config that is about something else.

    A run without any row is about nothing yet: what a job that failed before wrote of it is forgotten.
    """
    if not holds_rows(run, "corpus"):
        for key in ["manifest.json", *run.list("checkpoints"), *run.list("stages")]:
            run.delete(key)
    settings = {k: v for k, v in model.task_settings.items() if k not in ("tokenizer", "model")}
    tokenizer = getattr(getattr(task, "tokenizer", None), "name_or_path", None)
    identity = {
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
    """Return a hash of the tokenizer's own files."""
    digest = hashlib.sha256()
    for name in _TOKENIZER:
        if (folder / name).exists():
            digest.update(name.encode() + (folder / name).read_bytes())
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
) -> None:
    """Stage 0: stream records once into rows. A set that is already there stays as it is.

    `folder` is the model's: it says what the model can read. Raises StageMismatch if the source has changed since: the
    run's rows would no longer be the corpus's. A source of which no row was kept may change.
    """
    record = {"path": section.path, "split": section.split, "limit": section.limit, "content": content(section.path)}
    if not holds_rows(run, f"corpus/{name}"):
        run.delete(f"stages/ingest-{name}.json")
    other = "another run" if name == TRAIN else "another queries.name"
    declare(run, f"stages/ingest-{name}.json", record, f"corpus {name!r} of run {run.uri}", other)
    limits = read_limits(folder)
    records = islice(read_records(section.path, split=section.split), section.limit)
    own_task = ":" in task_name

    def rows_of(record: dict) -> list[dict]:
        if own_task:
            refuse_reserved(record)
        return limits.check(encode(task, record))

    report = ingest(run, name, records, rows_of)
    say(
        f"{name}: {report.examples:,} examples of {report.documents:,} records, {report.tokens:,} tokens, "
        f"{report.truncated:,} truncated, {report.chunked:,} chunked"
    )


def refuse_reserved(record: dict) -> None:
    """Raise ValueError for a field that a user's own task would find replaced by a column of ours."""
    taken = sorted((OWN.keys() - {"id"}) & record.keys())
    if taken:
        raise ValueError(f"field {taken[0]!r} is a column of every corpus and would be replaced: give it another name")


def content(path: str) -> str:
    """Return a fingerprint of a source: every file's name, size, first and last MiB."""
    location, keys = source_files(path)
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{key} {location.size(key)}".encode())
        digest.update(location.read_range(key, 0, _EDGE) + location.read_range(key, -_EDGE))
    return digest.hexdigest()[:16]


def same_model(home: Location, run: Location, model: ModelSpec) -> None:
    """Refuse to score against a store whose rows were made of another task or with other weights.

    Raises ValueError naming what differs.
    """
    if not home.exists("manifest.json"):
        raise ValueError(f"run.store={home.uri} holds no run: check the path")
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
