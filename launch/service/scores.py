"""One label's scores as the service reads them: from the finished index, or from the shards that are done so far.

Both kinds answer the same questions with Arrow tables. Nothing is scanned for a single query or example.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.index import Fields, belongs, find_briefs, query_tables
from actors.score import load_scores, scores_key
from engine.models import import_path
from engine.tasks.contract import BUILT_IN
from engine.topk import TopK, merge
from storage.corpus import Corpus
from storage.gradients import QUARANTINED
from storage.index import SIDES, ScoreIndex, sort_by_example
from storage.journal import Journal
from storage.locations import Location
from storage.sorted_tables import SortedTable

NUMBERS = ("self_influence", "total", "loss")  # what is known of every training example
_KEPT = {"self_influence": "self_influence", "total": "totals", "loss": "losses"}  # as a shard's scores call them
_BRIEF = ("source_id", "label", "snippet")


class Scores(Protocol):
    """What both kinds answer. `covered`: the share of the training rows that was scored."""

    @property
    def covered(self) -> float: ...
    def queries(self) -> pa.Table: ...  # query, predicted, misclassified, loss, source_id, label, snippet
    def influences(self, query: int) -> pa.Table: ...  # side, rank, id, score, source_id, label, snippet
    def influenced(self, example: int) -> pa.Table: ...  # query, side, rank, score; the strongest first
    def ids(self) -> np.ndarray: ...  # int64, ascending: the examples scored
    def numbers(self, column: str) -> np.ndarray: ...  # float64, one per id, NaN where there is none
    def examples(self, ids: np.ndarray) -> list[dict[str, Any]]: ...  # rows in the order asked for


class FinishedScores:
    """A finished index: its tables stay open, its query table and number columns stay in memory once asked for."""

    covered = 1.0

    def __init__(self, index: ScoreIndex, queries: Corpus) -> None:
        self.index, self.corpus = index, queries
        self._numbers: dict[str, np.ndarray] = {}

    @cached_property
    def by_query(self) -> SortedTable:
        return self.index.open_table("by_query")

    @cached_property
    def by_example(self) -> SortedTable:
        return self.index.open_table("by_example")

    @cached_property
    def _influenced(self) -> SortedTable | pa.Table:
        """The table of an older index, made without it, is sorted here and kept in memory."""
        try:
            return self.index.open_table("influenced")
        except FileNotFoundError:
            return sort_by_example(self.by_query)

    @cached_property
    def _queries(self) -> pa.Table:
        try:
            with self.index.open_table("queries") as table:
                return table.columns(table.schema.names)
        except FileNotFoundError:
            last = self.index.meta["checkpoints"][-1]["name"]
            fields = Fields(**self.index.meta.get("fields", {}))
            return pa.concat_tables(query_tables(self.index.run, self.index.label, last, self.corpus, fields))

    def queries(self) -> pa.Table:
        return self._queries

    def influences(self, query: int) -> pa.Table:
        return self.by_query.where(query, ["side", "rank", "id", "score", *_BRIEF])

    def influenced(self, example: int) -> pa.Table:
        table = self._influenced
        columns = ["query", "side", "rank", "score"]
        if isinstance(table, SortedTable):
            return table.where(example, columns)
        return table.filter(pc.equal(table["id"], example)).select(columns)

    def ids(self) -> np.ndarray:
        if "id" not in self._numbers:
            self._numbers["id"] = self.by_example.columns(["id"])["id"].to_numpy()
        return self._numbers["id"]

    def numbers(self, column: str) -> np.ndarray:
        if column not in self._numbers:
            values = self.by_example.columns([column])[column]
            self._numbers[column] = pc.fill_null(values, float("nan")).to_numpy().astype(np.float64)
        return self._numbers[column]

    def examples(self, ids: np.ndarray) -> list[dict[str, Any]]:
        found = {row["id"]: row for row in self.by_example.take(ids).to_pylist()}
        return [found[int(i)] for i in ids if int(i) in found]


@dataclass(frozen=True)
class PartialScores:
    """The shards done so far, merged. Memory: the top-k of every query, three numbers per example."""

    run: Location
    label: str
    record: dict[str, Any]  # the score stage's
    train: Corpus
    corpus: Corpus  # of the queries
    fields: Fields
    top: TopK | None = None
    shards: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # unit -> ids, state and numbers

    @property
    def covered(self) -> float:
        return sum(len(shard["ids"]) for shard in self.shards.values()) / max(1, self.train.rows)

    def refreshed(self) -> "PartialScores":
        """Return these scores with the shards that were done since; itself if there are none."""
        new = [unit for unit in Journal(self.run, f"score-{self.label}").done() if unit not in self.shards]
        if not new:
            return self
        top, shards = self.top, dict(self.shards)
        for unit in new:
            shard = load_scores(self.run, scores_key(self.label, self._place(unit)))
            top = shard.top if top is None else merge(top, shard.top, self.record["top_k"])
            shards[unit] = {name: np.asarray(getattr(shard, name)) for name in ("ids", "state", *_KEPT.values())}
        return replace(self, top=top, shards=dict(sorted(shards.items())))  # a unit's name sorts as its first id does

    def _place(self, unit: str) -> dict[str, Any]:
        segment, _, start = unit.removeprefix(f"{self.record['corpus']}-").rpartition("-")
        return {"segment": segment, "start": int(start)}

    def _all(self, name: str) -> np.ndarray:
        parts = [shard[name] for shard in self.shards.values()]
        return np.concatenate(parts) if parts else np.empty(0)

    def queries(self) -> pa.Table:
        last = self.record["checkpoints"][-1]
        return pa.concat_tables(query_tables(self.run, self.label, last, self.corpus, self.fields))

    def influences(self, query: int) -> pa.Table:
        rows = list(self._rows(query))
        briefs = find_briefs(self.train, np.unique([row["id"] for row in rows]).astype(np.int64), self.fields)
        return pa.Table.from_pylist([row | briefs[row["id"]] for row in rows], schema=_INFLUENCES)

    def _rows(self, query: int) -> Iterator[dict[str, Any]]:
        if self.top is None or query >= self.top.ids.shape[1]:
            return
        for place, side in enumerate(SIDES):
            pairs = zip(self.top.ids[place, query], self.top.scores[place, query], strict=True)
            for rank, (example, score) in enumerate(pairs):
                if belongs(side, score):
                    yield {"side": side, "rank": rank, "id": int(example), "score": float(score)}

    def influenced(self, example: int) -> pa.Table:
        found: list[dict[str, Any]] = []
        if self.top is not None:
            for place, query, rank in zip(*np.nonzero(self.top.ids == example), strict=True):
                score = float(self.top.scores[place, query, rank])
                if belongs(SIDES[place], score):
                    found.append({"query": int(query), "side": SIDES[place], "rank": int(rank), "score": score})
        found.sort(key=lambda row: (-abs(row["score"]), row["query"]))
        return pa.Table.from_pylist(found, schema=_INFLUENCED)

    def ids(self) -> np.ndarray:
        return self._all("ids").astype(np.int64)

    def numbers(self, column: str) -> np.ndarray:
        return self._all(_KEPT[column]).astype(np.float64)

    def examples(self, ids: np.ndarray) -> list[dict[str, Any]]:
        known = self.ids()
        places = {int(i): int(p) for i, p in zip(ids, np.searchsorted(known, ids), strict=True)}
        places = {i: p for i, p in places.items() if p < len(known) and known[p] == i}
        briefs = find_briefs(self.train, np.array(sorted(places), dtype=np.int64), self.fields)
        numbers = {name: self.numbers(name) for name in NUMBERS}
        state = self._all("state")
        return [
            {"id": i, "quarantined": bool(state[p] == QUARANTINED), **briefs[i]}
            | {name: None if np.isnan(values[p]) else float(values[p]) for name, values in numbers.items()}
            for i, p in places.items()
        ]


def shown_by(model: dict[str, Any]) -> Fields:
    """Return the fields that answers show of a built-in task's records, from its settings and their defaults."""
    if model["task"] not in BUILT_IN:
        return Fields()
    defaults = inspect.signature(import_path(BUILT_IN[model["task"]])).parameters

    def named(field: str) -> str | None:
        default = defaults[field].default if field in defaults else None
        return model["task_settings"].get(field, default)

    return Fields(named("text_field") or "text", named("label_field") or named("target_field") or "label")


_INFLUENCED = pa.schema([("query", pa.int64()), ("side", pa.string()), ("rank", pa.int64()), ("score", pa.float64())])
_INFLUENCES = pa.schema(
    [("side", pa.string()), ("rank", pa.int64()), ("id", pa.int64()), ("score", pa.float64())]
    + [(name, pa.string()) for name in _BRIEF]
)
