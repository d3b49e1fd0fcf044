"""Stage 2: a method's query state, once per checkpoint, kept as one file that every worker reads.

The last checkpoint also leaves what it answers to every query: loss, prediction, and whether that is a mistake.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from actors.context import CheckpointSource, WorkerContext
from actors.leftovers import put
from actors.specs import ModelSpec
from actors.states import save_state
from actors.units import Receipt, Unit
from engine.batches import Batch
from engine.gradient_batch import GradientBatch, nonfinite
from engine.methods.contract import QueryState, averages, load_method
from engine.projection import RowLayout
from engine.tasks.contract import Task, predict
from engine.tasks.labels import Labels
from storage.locations import to_json


def prepare_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Prepare all queries under one checkpoint and save the state, under the payload's key."""
    model, spec, score = settings["model"], settings["gradients"], settings["score"]
    checkpoint = unit.payload["checkpoint"]
    corpus = context.corpus(None, score.queries)
    rows = [row for s in corpus.segments for row in corpus.read(s, 0, s.rows)]
    form = "rows" if score.stored or spec.projection.kind != "none" else "whole"
    source = CheckpointSource(context, model, checkpoint, spec, form, score.label)
    method = load_method(score.method, score.method_settings)
    state = method.prepare(query_batches(context.task(model), rows, spec.token_budget), source)
    if averages(method):
        state = replace(state, weight=state.weight / len(score.checkpoints))
    refuse_nonfinite(state, source.layout, [f"{row['id']} (source:{row['source_id']})" for row in rows], checkpoint)
    records = [put(context, settings, unit, unit.payload["key"], save_state(state))]
    if checkpoint == score.checkpoints[-1]:
        answers = to_json(query_answers(context, model, checkpoint, rows, state, spec.token_budget))
        records.append(put(context, settings, unit, answers_key(score.label), answers))
    tokens = int(sum(row["length"] for row in rows))
    written = sum(record.size for record in records)
    return Receipt(unit.key, rows=len(rows), tokens=tokens, bytes=written, objects=[asdict(r) for r in records])


def query_answers(
    context: WorkerContext, model: ModelSpec, checkpoint: str, rows: list[dict], state: QueryState, token_budget: int
) -> list[dict[str, Any]]:
    """Return loss, predicted and misclassified of every query; the last two None where the task has no such notion."""
    task, network = context.task(model), context.model(model, checkpoint)
    predicted: list[Any] = []
    for batch in query_batches(task, rows, token_budget):
        predicted += predict(task, network, batch.to(context.device)) or [None] * len(batch)
    return [
        {"loss": float(loss), "predicted": plain(answer), "misclassified": misclassified(task, row, answer)}
        for loss, answer, row in zip(state.losses, predicted, rows, strict=True)
    ]


def misclassified(task: Task, row: dict[str, Any], predicted: Any) -> bool | None:
    """Return whether the predicted label is not the query's own; None for a task that predicts no labels."""
    field, labels = getattr(task, "label_field", None), getattr(task, "labels", None)
    if predicted is None or field is None or row.get(field) is None:
        return None
    if isinstance(labels, Labels):  # the corpus may hold names or numbers
        return labels.index(predicted, field) != labels.index(row[field], field)
    return str(predicted) != str(row[field])


def plain(answer: Any) -> str | int | float | None:
    """Return a prediction as JSON can hold it; one that is no finite number or string as its text."""
    value = answer.item() if isinstance(answer, np.generic | torch.Tensor) else answer
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def answers_key(label: str) -> str:
    return f"states/{label}/answers.json"


def refuse_nonfinite(state: QueryState, layout: RowLayout, names: list[str], checkpoint: str) -> None:
    """Raise FloatingPointError naming the first query whose loss or gradient is not finite, and where."""
    ids = torch.arange(len(names))
    for position, where in sorted(nonfinite(GradientBatch(ids, state.losses, state.arrays, None), layout).items()):
        raise FloatingPointError(
            f"query {names[position]} is not finite: {where} under {checkpoint}. Leave it out, under a new queries.name "
            f"if it stands in a file, or set gradients.compute=float32."
        )


def query_batches(task: Task, rows: list[dict], token_budget: int) -> list[Batch]:
    """Return consecutive queries in batches of at most token_budget padded tokens, in their own order."""
    batches, begin, longest = [], 0, 0
    for stop, row in enumerate(rows):
        longest = max(longest, int(row.get("length", 1)))
        if stop > begin and (stop - begin + 1) * longest > token_budget:
            batches.append(task.collate(rows[begin:stop]))
            begin, longest = stop, int(row.get("length", 1))
    return [*batches, task.collate(rows[begin:])]
