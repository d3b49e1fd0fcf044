"""Stage 2: a method's query state, once per checkpoint, kept as one file that every worker reads."""

from dataclasses import asdict
from typing import Any

import torch

from actors.context import CheckpointSource, WorkerContext
from actors.states import save_state, state_key
from actors.units import Receipt, Unit
from engine.batches import Batch
from engine.methods.contract import load_method
from engine.tasks.contract import Task
from storage.locations import ObjectRecord


def prepare_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Prepare all queries under one checkpoint and save the state."""
    model, spec, score = settings["model"], settings["gradients"], settings["score"]
    checkpoint = unit.payload["checkpoint"]
    corpus = context.corpus(None, score.queries)
    rows = [row for s in corpus.segments for row in corpus.read(s, 0, s.rows)]
    form = "rows" if score.stored or spec.projection.kind != "none" else "whole"
    source = CheckpointSource(context, model, checkpoint, spec, form)
    method = load_method(score.method, score.method_settings)
    state = method.prepare(query_batches(context.task(model), rows, spec.token_budget), source)
    bad = ~torch.isfinite(state.losses)
    for array in state.arrays.values():
        bad |= ~torch.isfinite(array).all(1)
    if bad.any():
        first = rows[int(torch.nonzero(bad)[0])]
        raise FloatingPointError(
            f"query {first['id']} ({first['source_id']}) has a non-finite loss or gradient at checkpoint {checkpoint}: "
            f"leave it out of queries.path, or compute in float32."
        )
    key = state_key(score.label, checkpoint)
    data = save_state(state)
    context.run.create(key, data)
    record = ObjectRecord.of(key, data)
    tokens = int(sum(row["length"] for row in rows))
    return Receipt(unit.key, rows=len(rows), tokens=tokens, bytes=len(data), objects=[asdict(record)])


def query_batches(task: Task, rows: list[dict], token_budget: int) -> list[Batch]:
    """Return consecutive queries in batches of at most token_budget padded tokens, in their own order."""
    batches, begin, longest = [], 0, 0
    for stop, row in enumerate(rows):
        longest = max(longest, int(row.get("length", 1)))
        if stop > begin and (stop - begin + 1) * longest > token_budget:
            batches.append(task.collate(rows[begin:stop]))
            begin, longest = stop, int(row.get("length", 1))
    return [*batches, task.collate(rows[begin:])]
