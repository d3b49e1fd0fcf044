"""Stage 2: a method's query state, once per checkpoint, kept as one file that every worker reads."""

from dataclasses import asdict
from typing import Any

import torch

from actors.context import CheckpointSource, WorkerContext
from actors.leftovers import put
from actors.states import save_state, state_key
from actors.units import Receipt, Unit
from engine.batches import Batch
from engine.gradients import GradientBatch, nonfinite
from engine.methods.contract import QueryState, load_method
from engine.projection import RowLayout
from engine.tasks.contract import Task


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
    refuse_nonfinite(state, source.layout, [f"{row['id']} (source:{row['source_id']})" for row in rows], checkpoint)
    key = state_key(score.label, checkpoint)
    data = save_state(state)
    record = put(context, settings, unit, key, data)
    tokens = int(sum(row["length"] for row in rows))
    return Receipt(unit.key, rows=len(rows), tokens=tokens, bytes=len(data), objects=[asdict(record)])


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
