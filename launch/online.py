"""Answers to new queries from what a run has stored: prepare the query as the job would, then scan the store exactly."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.context import CheckpointSource, WorkerContext
from actors.index import Fields, belongs, find_briefs
from actors.neighbours import search_neighbours
from actors.plan import shards
from actors.prepare import query_batches, refuse_nonfinite
from actors.score import add_up, state_block
from actors.specs import GradientSpec, ModelSpec, ScoreSpec
from engine.limits import read_limits
from engine.methods.contract import Method, QueryState
from engine.tasks.contract import encode, predict
from engine.topk import TopK, merge
from storage.corpus import Corpus
from storage.index import SIDES


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


@dataclass(frozen=True)
class Answer:
    """The strongest examples for one query, best first; each with id, score, source_id, label and snippet."""

    query: dict[str, Any]
    proponents: list[dict[str, Any]]
    opponents: list[dict[str, Any]]


def predicted_label(setting: Setting, record: dict[str, Any]) -> Any:
    """Return the label that the last checkpoint gives a record without one."""
    task = setting.context.task(setting.model)
    placeholder = record | {getattr(task, "label_field", "label"): 0}
    rows = encoded(setting, placeholder)
    model = setting.context.model(setting.model, setting.score.checkpoints[-1])
    answers = predict(task, model, task.collate(rows).to(setting.context.device))
    if answers is None:
        raise ValueError(f"task {setting.model.task} makes no predictions: give the label with --label")
    return answers[0]


def encoded(setting: Setting, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the examples of a record as at ingest. Raises ValueError for one that the model cannot read."""
    limits = read_limits(setting.context.folder(setting.model, setting.score.checkpoints[-1]))
    return [record | row for row in limits.check(encode(setting.context.task(setting.model), record))]


def score_records(setting: Setting, records: list[dict[str, Any]], k: int, kind: str = "exact") -> list[Answer]:
    """Return the proponents and opponents of new records.

    "exact" scans the store, one shard in memory at a time; another kind asks the neighbour index of that name.
    """
    task, states = setting.context.task(setting.model), {}
    rows = [first_row(one_example(setting, record)) for record in records]
    if not rows:
        return []
    for name in setting.score.checkpoints:
        source = CheckpointSource(setting.context, setting.model, name, setting.gradients, "rows")
        states[name] = setting.method.prepare(query_batches(task, rows, setting.gradients.token_budget), source)
        refuse_nonfinite(states[name], source.layout, ["(new)"] * len(rows), name)
    corpus = setting.context.corpus(setting.score.home, setting.score.corpus)
    if kind == "exact":
        top = scan(setting, corpus, states, k)
    else:
        run, ordered = setting.context.run, list(states.values())
        top = search_neighbours(run, setting.score.label, kind, setting.method, ordered, k)
    return [
        Answer(
            record,
            *(found(corpus, name, top.ids[s, i], top.scores[s, i], setting.fields) for s, name in enumerate(SIDES)),
        )
        for i, record in enumerate(records)
    ]


def one_example(setting: Setting, record: dict[str, Any]) -> dict[str, Any]:
    """Return the record's one example. Raises ValueError if it is longer than an example may be."""
    found = encoded(setting, record)
    if len(found) > 1:
        raise ValueError(f"the query fills {len(found)} chunks of the task's max_tokens: ask about one of them")
    return found[0]


def first_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": -1, "length": len(row["input_ids"]) if "input_ids" in row else 1} | row


def scan(setting: Setting, corpus: Corpus, states: dict[str, QueryState], k: int) -> TopK:
    """Return the top-k of all stored rows, one shard after another."""
    top, spec = None, replace(setting.score, top_k=k, dense=False)
    segments = {s.name: s for s in corpus.segments}
    for at in shards(corpus, setting.shard_rows):
        ids = segments[at["segment"]].base + np.arange(at["start"], at["stop"], dtype=np.int64)
        parts = (
            state_block(setting.context, setting.score, setting.gradients, at, ids, n, s) for n, s in states.items()
        )
        here = add_up(ids, parts, spec).top
        top = here if top is None else merge(top, here, k)
    assert top is not None
    return top


def found(corpus: Corpus, side: str, ids: np.ndarray, scores: np.ndarray, fields: Fields) -> list[dict[str, Any]]:
    """Return one side of an answer."""
    pairs = [(int(i), float(s)) for i, s in zip(ids, scores, strict=True) if i >= 0 and belongs(side, s)]
    briefs = find_briefs(corpus, np.unique([i for i, _ in pairs]), fields)
    return [{"id": i, "score": s, **briefs[i]} for i, s in pairs]
