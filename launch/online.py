"""Answers to new queries from what a run has stored: prepare the query as the job would, then scan the store exactly."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.context import CheckpointSource, WorkerContext
from actors.index import brief
from actors.plan import shards
from actors.prepare import query_batches
from actors.score import add_up, state_block
from actors.specs import GradientSpec, ModelSpec, ScoreSpec
from engine.methods.contract import Method, QueryState
from engine.tasks.contract import encode, predict
from engine.topk import TopK, merge
from storage.corpus import Corpus


@dataclass(frozen=True)
class Setting:
    """What a label's scores were made with, ready to be used again."""

    context: WorkerContext
    model: ModelSpec
    gradients: GradientSpec
    score: ScoreSpec
    method: Method
    shard_rows: int


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
    rows = [placeholder | row for row in encode(task, placeholder)]
    model = setting.context.model(setting.model, setting.score.checkpoints[-1])
    answers = predict(task, model, task.collate(rows).to(setting.context.device))
    if answers is None:
        raise ValueError(f"task {setting.model.task} makes no predictions: give the label with --label")
    return answers[0]


def score_records(setting: Setting, records: list[dict[str, Any]], k: int) -> list[Answer]:
    """Return the proponents and opponents of new records by an exact scan of the store. Memory: one shard."""
    task, states = setting.context.task(setting.model), {}
    rows = [first_row(record | row) for record in records for row in encode(task, record)[:1]]
    for name in setting.score.checkpoints:
        source = CheckpointSource(setting.context, setting.model, name, setting.gradients, "rows")
        states[name] = setting.method.prepare(query_batches(task, rows, setting.gradients.token_budget), source)
    corpus = setting.context.corpus(setting.score.home, setting.score.corpus)
    top = scan(setting, corpus, states, k)
    return [
        Answer(record, *(found(corpus, top.ids[side, i], top.scores[side, i]) for side in (0, 1)))
        for i, record in enumerate(records)
    ]


def first_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": -1, "length": len(row["input_ids"]) if "input_ids" in row else 1} | row


def scan(setting: Setting, corpus: Corpus, states: dict[str, QueryState], k: int) -> TopK:
    """Return the top-k of all stored rows, one shard after another."""
    top: TopK | None = None
    segments = {s.name: s for s in corpus.segments}
    for at in shards(corpus, setting.shard_rows):
        ids = segments[at["segment"]].base + np.arange(at["start"], at["stop"], dtype=np.int64)
        parts = (
            state_block(setting.context, setting.score, setting.gradients, at, ids, n, s) for n, s in states.items()
        )
        here = add_up(ids, parts, setting.score).top
        top = here if top is None else merge(top, here, max(k, 1))
    assert top is not None
    return TopK(top.ids[:, :, :k], top.scores[:, :, :k])


def found(corpus: Corpus, ids: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Return one side of an answer."""
    return [{"id": int(i), "score": float(s), **brief(corpus.row(int(i)))} for i, s in zip(ids, scores, strict=True)]
