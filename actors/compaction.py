"""Erased examples leave the bytes: a new generation of every segment that holds one, and of all that was made of it.

A generation is the same rows under the same ids, the erased ones blank: empty texts, NaN gradient rows, no scores. It is
written whole before its segment.json makes it the one that counts; then indices are built again and the old generation
is deleted. A compaction that was killed goes on where it stopped.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from actors.index import Fields, IndexJob, build_index
from actors.plan import shard_key, shards
from actors.score import load_shard, save_scores, scores_key
from actors.specs import ModelSpec, ScoreSpec
from engine.topk import without
from storage.corpus import Corpus, erased_ids
from storage.damage import record_of
from storage.gradients import ERASED, GradientStore
from storage.index import ScoreIndex
from storage.journal import Journal
from storage.locations import Location, ObjectRecord
from storage.segments import Segment, blank_segment, committed_segments

GENERATION = re.compile(r"(?<=[/-])\d{6}\.\d+(?=[/-])")
UNIT = re.compile(r"(?P<lead>.*-)?(?P<segment>\d{6}\.\d+)-(?P<start>\d{9})$")


def compact(run: Location, may_delete: Callable[[], None], say: Callable[[str], None]) -> None:
    """Blank all erased examples of the run's training corpus, and of all scores in this run, whosever corpus they are of.

    `may_delete` raises once another driver holds the run.
    """
    erased = erased_ids(run, "train")
    for segment in committed_segments(run, "train"):
        inside = {i for i in erased if segment.base <= i < segment.base + segment.rows}
        if len(inside) > segment.blanked:
            number, _, generation = segment.name.partition(".")
            new = f"{number}.{int(generation) + 1}"
            blank_gradients(run, segment, new, inside)
            for label in _labels(run):
                blank_scores(run, label, segment, new, inside)
            may_delete()
            blank_segment(run, "train", segment, new, frozenset(inside))
            say(f"segment {segment.name}: {len(inside):,} of {segment.rows:,} examples blanked, now {new}")
    for label in ScoreIndex.labels(run):
        if _holds_erased(run, label):
            may_delete()
            rebuild_index(run, label)
            say(f"scores {label}: index built again")
    may_delete()
    say(f"{delete_old_generations(run):,} objects deleted")


def blank_gradients(run: Location, segment: Segment, new: str, inside: set[int]) -> None:
    """Write the new generation of every shard of gradient rows that is done."""
    journal = Journal(run, "collect-train")
    done = {unit: record for unit, record in journal.done().items() if f"-{segment.name}-" in unit}
    if not done:
        return
    store = GradientStore.open(run)
    for unit, record in done.items():
        found = UNIT.match(unit)
        assert found is not None
        checkpoint, start = str(found["lead"]).removesuffix("-train-"), int(found["start"])
        store.prepare("train", checkpoint, new, segment.rows, int(store.settings.extra["shard_rows"]))
        ids = segment.base + np.arange(start, start + record["rows"])
        erased = np.isin(ids, list(inside))
        objects = store.blank_shard("train", checkpoint, segment.name, new, start, erased)
        journal.commit(f"{checkpoint}-train-{new}-{start:09d}", _record(record, objects, ids[erased]))


def blank_scores(run: Location, label: str, segment: Segment, new: str, inside: set[int]) -> None:
    """Write the new generation of every shard of one label's scores that is done."""
    journal = Journal(run, f"score-{label}")
    for unit, record in list(journal.done().items()):
        found = UNIT.match(unit)
        if found is None or found["segment"] != segment.name:
            continue
        at = {"segment": segment.name, "start": int(found["start"])}
        shard = load_shard(run, label, "train", at)
        gone = np.isin(shard.ids, list(inside))
        blank: dict[str, Any] = {"state": np.where(gone, np.uint8(ERASED), shard.state)}
        for name in ("totals", "self_influence", "losses"):
            blank[name] = np.where(gone, np.nan, getattr(shard, name))
        if shard.dense is not None:
            blank["dense"] = np.where(gone[:, None], np.float32(np.nan), shard.dense)
        data = save_scores(replace(shard, top=without(shard.top, inside), **blank))
        there = at | {"segment": new}
        run.create(scores_key(label, there), data)
        objects = [ObjectRecord.of(scores_key(label, there), data)]
        journal.commit(shard_key("train", there), _record(record, objects, shard.ids[gone]))


def rebuild_index(run: Location, label: str) -> None:
    """Write a finished label's tables again from its shards, without what was erased; neighbour indices go."""
    index, record = ScoreIndex.open(run, label), run.read_json(f"stages/score-{label}.json")
    kept = {name: value for name, value in record.items() if name in ScoreSpec.__dataclass_fields__}
    spec = ScoreSpec(label=label, **kept | {"checkpoints": tuple(record["checkpoints"])})
    home = Location.parse(spec.home) if spec.home else run
    pieces = shards(Corpus.open(home, spec.corpus), record["shard_rows"])
    model = ModelSpec(**record["model"], checkpoints=())
    meta = index.meta
    fields = Fields(**meta["fields"])
    job = IndexJob(run, model, spec, meta["score_unit"], meta["granularity"], meta["projection"], pieces, fields)
    for key in [*run.list(f"journal/index-{label}"), *run.list(f"index/{label}")]:
        if not key.endswith(".parquet"):
            run.delete(key)  # meta.json among them: until it is back, the label is not finished
    for key in run.list(f"index/{label}"):
        if ".faiss" in key:
            run.delete(key)
    build_index(job, meta)
    tables = [asdict(record_of(run, key)) for key in run.list(f"index/{label}")]
    Journal(run, f"index-{label}").commit("tables", {"objects": tables})


def delete_old_generations(run: Location) -> int:
    """Delete every object of generations that no longer count, and what the journal says of them; return how many."""
    current = {segment.name for segment in committed_segments(run, "train")}
    folders = ["corpus/train", "gradients/train", "journal/collect-train", "journal/ingest-train"]
    for label in _labels(run):
        folders += [f"scores/{label}", f"journal/compute-{label}", f"journal/score-{label}"]
    numbers, count = {name.partition(".")[0] for name in current}, 0
    for key in (key for folder in folders for key in run.list(folder)):
        old = set(GENERATION.findall(key)) - current
        if any(name.partition(".")[0] in numbers for name in old):
            run.delete(key)
            count += 1
    return count


def _labels(run: Location) -> list[str]:
    """Return the labels of scores over this run's own corpus."""
    keys = [key for key in run.list("stages") if key.startswith("stages/score-")]
    return [key.removeprefix("stages/score-").removesuffix(".json") for key in keys if not run.read_json(key)["home"]]


def _holds_erased(run: Location, label: str) -> bool:
    """Tell whether the tables of a label still have an erased example."""
    index = ScoreIndex.open(run, label)
    home = index.meta["corpus_home"]
    erased = np.fromiter(erased_ids(Location.parse(home) if home else run, index.meta["corpus"]), np.int64)
    with index.open_table("by_example") as table:
        return bool(len(erased)) and table.take(erased).num_rows > 0


def _record(record: dict[str, Any], objects: list[ObjectRecord], erased: np.ndarray) -> dict[str, Any]:
    bad = {row: where for row, where in record.get("quarantined", {}).items() if int(row) not in erased}
    return record | {"objects": [asdict(one) for one in objects], "quarantined": bad}
