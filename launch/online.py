"""Answers to new queries from what a run has stored: prepare the query as the job would, then scan the store exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.context import CheckpointSource, WorkerContext
from actors.index import Fields, belongs, find_briefs
from actors.neighbours import EXACT, about_search, search_neighbours
from actors.prepare import query_batches, refuse_nonfinite
from actors.scan import scan as scan_store
from actors.solve import leave_out, solve_new
from actors.specs import CheckpointSpec, GradientSpec, ModelSpec, ScoreSpec
from engine.batches import Batch
from engine.limits import read_limits
from engine.memory import CPU_TOKENS
from engine.methods.contract import Method, QueryState, inverse_of, load_method
from engine.projection import Projection
from engine.tasks.contract import Task, encode, predict
from engine.tasks.labels import Labels
from engine.topk import TopK
from storage.corpus import Corpus, erased_ids
from storage.index import SIDES, ScoreIndex
from storage.locations import Location
from storage.rows import OWN


@dataclass(frozen=True)
class Setting:
    """What a label's scores were made with, ready to be used again."""

    context: WorkerContext
    model: ModelSpec
    gradients: GradientSpec
    score: ScoreSpec
    method: Method
    shard_rows: int
    fields: Fields

    @property
    def task(self) -> Task:
        return self.context.task(self.model)

    @property
    def corpus(self) -> Corpus:
        return self.context.corpus(self.score.home, self.score.corpus)


@dataclass(frozen=True)
class Answer:
    """The strongest examples for one query, best first; each with id, score, source_id, label and snippet."""

    query: dict[str, Any]
    proponents: list[dict[str, Any]]
    opponents: list[dict[str, Any]]
    search: str = EXACT  # or the kind of neighbour index that was asked
    recall: dict[str, float] | None = None  # of that index on either side, as measured when it was built


def read_checkpoints(run: Location) -> tuple[CheckpointSpec, ...]:
    """Return a run's checkpoints in order of training."""
    records = [run.read_json(key) for key in run.list("checkpoints")]
    found = [CheckpointSpec(**{k: v for k, v in record.items() if k != "hash"}) for record in records]
    return tuple(sorted(found, key=lambda checkpoint: checkpoint.step))


def read_setting(run: Location, index: ScoreIndex) -> Setting:
    """Return what is needed to look again at what a label's scores were made of.

    FileNotFoundError names a checkpoint that took part and whose record is gone.
    """
    record = run.read_json(f"stages/score-{index.label}.json")
    found = read_checkpoints(run)
    missing = sorted(set(record["checkpoints"]) - {checkpoint.name for checkpoint in found})
    if missing:
        raise FileNotFoundError(
            f"{run.uri} lacks checkpoints/{missing[0]}.json, which scores {index.label} were made with. Restore the "
            f"file, or run launch/score.py again with that checkpoint."
        )
    g = record["gradients"]
    fields = {k: v for k, v in record.items() if k in ScoreSpec.__dataclass_fields__}
    fields["checkpoints"] = tuple(fields["checkpoints"])
    fields["method_settings"] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields["method_settings"].items()
    }
    score = ScoreSpec(label=index.label, **fields)
    return Setting(
        WorkerContext(run.uri),
        ModelSpec(**record["model"], checkpoints=found),
        GradientSpec(
            tuple(g["parameters"]), Projection(**g["projection"]), g["norms"], min(g["token_budget"], CPU_TOKENS)
        ),
        score,
        load_method(score.method, score.method_settings),
        int(record["shard_rows"]),
        Fields(**index.meta["fields"]),
    )


def answers_at_once(setting: Setting) -> bool:
    """Tell whether these scores answer a new query from what is stored."""
    return setting.method.online and setting.score.stored


def refuse_offline(setting: Setting) -> None:
    """Raise ValueError for scores that cannot answer a new query at once."""
    if not answers_at_once(setting):
        raise ValueError(
            f"scores {setting.score.label} cannot answer a new text at once: "
            + (
                "they were made without a store. "
                if setting.method.online
                else "every query needs passes of its own over the training data. "
            )
            + "Put it into a query set and run score.py, or score with "
            + ("gradients.store=true." if setting.method.online else "a method that is online.")
        )


def text_field(setting: Setting) -> str:
    """Return the field that the task reads a text from. Raises ValueError for a task that reads none."""
    field = getattr(setting.task, "text_field", None)
    if field is None:
        raise ValueError(f"task {setting.model.task} reads no text: store such queries in a query set and run score.py")
    return field


def with_labels(setting: Setting, records: list[dict[str, Any]], labels: list[Any] | None) -> list[dict[str, Any]]:
    """Return the records under the given labels, or without any under those that the model predicts.

    A label is written as the stored queries' are. ValueError for labels that a task does not take, and for a wrong number.
    """
    label_field = getattr(setting.task, "label_field", None)
    if labels is not None and not label_field:
        raise ValueError(f"task {setting.model.task} takes no label: leave it out")
    if labels is not None and (isinstance(labels, str) or len(labels) != len(records)):
        raise ValueError(f"labels={labels!r} is not allowed: a list of {len(records)}, one for every query")
    if not label_field:
        return records
    stored = setting.context.corpus(None, setting.score.queries).row(0).get(label_field)
    chosen = labels if labels is not None else [predicted_label(setting, record) for record in records]
    return [
        record | {label_field: written_alike(setting.task, label, stored, label_field)}
        for record, label in zip(records, chosen, strict=True)
    ]


def written_alike(task: Task, label: Any, stored: Any, field: str) -> Any:
    """Return a label as the stored one is written: a class's number, or its name."""
    labels = getattr(task, "labels", None)
    if not isinstance(labels, Labels):
        return label
    index = labels.index(label, field)
    return str(labels.name(index)) if isinstance(stored, str) else index


def predicted_label(setting: Setting, record: dict[str, Any]) -> Any:
    """Return the label that the last checkpoint gives a record without one."""
    task = setting.task
    placeholder = record | {getattr(task, "label_field", "label"): 0}
    rows = encoded(setting, placeholder)
    model = setting.context.model(setting.model, setting.score.checkpoints[-1])
    answers = predict(task, model, task.collate(rows).to(setting.context.device))
    if answers is None:
        raise ValueError(f"task {setting.model.task} makes no predictions: give the label with --label")
    return answers[0]


def encoded(setting: Setting, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the examples of a record as at ingest. Raises ValueError for one that the model cannot read."""
    folder = setting.context.folder(setting.model, setting.score.checkpoints[-1])
    limits = read_limits(Path(getattr(setting.task, "base", None) or folder))
    return [record | row for row in limits.check(encode(setting.task, record))]


def score_records(setting: Setting, records: list[dict[str, Any]], k: int, kind: str = EXACT) -> list[Answer]:
    """Return the proponents and opponents of new records.

    "exact" scans the store, a shard a core in memory at a time; another kind asks the neighbour index of that name.
    """
    if k < 1:
        raise ValueError(f"k={k} is not allowed: must be at least 1")
    if not records:
        return []
    states, run, label = prepare_records(setting, records), setting.context.run, setting.score.label
    if kind == EXACT:
        top = scan(setting, states, k)
    else:
        erased = erased_ids(setting.corpus.run, setting.corpus.name)
        top = search_neighbours(run, label, kind, setting.method, list(states.values()), k, erased)
    about = about_search(run, label, kind)
    answers = []
    for i, record in enumerate(records):
        proponents, opponents = (found(setting, name, top.ids[s, i], top.scores[s, i]) for s, name in enumerate(SIDES))
        answers.append(Answer(record, proponents, opponents, kind, about["recall"] if about else None))
    return answers


def prepare_records(setting: Setting, records: list[dict[str, Any]]) -> dict[str, QueryState]:
    """Return what the method prepares of new records, by checkpoint in order of training."""
    refuse_offline(setting)
    rows = [first_row(one_example(setting, record)) for record in records]
    states = {}
    for name in setting.score.checkpoints:
        source = CheckpointSource(setting.context, setting.model, name, setting.gradients, "rows", setting.score.label)
        states[name] = setting.method.prepare(batches_of(setting, rows), source)
        refuse_nonfinite(states[name], source.layout, ["(new)"] * len(rows), name)
        if inverse := inverse_of(setting.method):
            run, weight = setting.context.run, leave_out(setting.corpus)
            states[name] = solve_new(run, setting.score.label, inverse, states[name], weight)
    return states


def batches_of(setting: Setting, rows: list[dict[str, Any]]) -> list[Batch]:
    """Return the rows in batches. Raises ValueError naming a field that the task reads and a row does not have."""
    try:
        return query_batches(setting.task, rows, setting.gradients.token_budget)
    except KeyError as error:
        known = ", ".join(sorted(rows[0].keys() - {"id", "length"}))
        raise ValueError(
            f"the query has no field {error}, which task {setting.model.task} reads: it has {known}"
        ) from error


def one_example(setting: Setting, record: dict[str, Any]) -> dict[str, Any]:
    """Return the record's one example. Raises ValueError if it is longer than an example may be."""
    found = encoded(setting, record)
    if len(found) > 1:
        raise ValueError(f"the query fills {len(found)} chunks of the task's max_tokens: ask about one of them")
    return found[0]


def first_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a query's row as the corpus would hold it: one that a corpus holds as it is, any other under the id −1.

    A task may draw by the id, as masked-lm does: what the user calls a text must not change its answer.
    """
    if OWN.keys() <= row.keys():
        return row
    return row | {"id": -1, "length": len(row["input_ids"]) if "input_ids" in row else 1}


def scan(setting: Setting, states: dict[str, QueryState], k: int) -> TopK:
    """Return the top-k of all stored rows."""
    corpus = setting.corpus
    erased = erased_ids(corpus.run, corpus.name)
    return scan_store(
        setting.context, setting.method, setting.score, setting.gradients, corpus, setting.shard_rows, states, k, erased
    )


def found(setting: Setting, side: str, ids: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Return one side of an answer."""
    pairs = [(int(i), float(s)) for i, s in zip(ids, scores, strict=True) if i >= 0 and belongs(side, s)]
    briefs = find_briefs(setting.corpus, np.unique([i for i, _ in pairs]), setting.fields)
    return [{"id": i, "score": s, **briefs[i]} for i, s in pairs]
