"""The runs that a service was given, and what can be asked of one. HTTP routes and pages read through this alone.

A run may be empty, in the middle of its job or finished; a view looks again by itself, at most once a second. Names and
ids from outside only ever select among what a run holds: no path reaches storage.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.overview import RunWatch, health
from engine.methods.contract import load_method
from launch.service.asking import Answerer
from launch.service.errors import NotFound, NotOnline, NotReady
from launch.service.holdings import Holdings
from launch.service.media import plain_record, png_of
from launch.service.scores import NUMBERS, FinishedScores
from storage.index import SIDES
from storage.locations import Location


@dataclass(frozen=True)
class Page:
    """Some rows of a list, and how long it is."""

    rows: list[dict[str, Any]]
    total: int


class Catalog:
    """The given runs by name: the last part of their address, or the one before if that is `run`."""

    def __init__(self, uris: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._runs: dict[str, RunView] = {}
        for uri in uris:
            location = Location.parse(uri)
            name = base = _name_of(location.uri)
            number = 2
            while name in self._runs:
                name, number = f"{base}-{number}", number + 1
            self._runs[name] = RunView(name, location, clock)

    @property
    def names(self) -> list[str]:
        return list(self._runs)

    def run(self, name: str) -> "RunView":
        """Return the run of this name. NotFound for one that was not given."""
        if name not in self._runs:
            raise NotFound(f"there is no run {name!r}: there are {', '.join(self._runs)}")
        return self._runs[name]


class RunView:
    """One run. Threads may share it."""

    def __init__(self, name: str, location: Location, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.location = name, location
        self.held = Holdings(location, clock)
        self._answerers: dict[str, Answerer] = {}
        self._progress = RunWatch(location, clock)

    @property
    def uri(self) -> str:
        return self.location.uri

    def manifest(self) -> dict[str, Any]:
        """Return what the run is about; {} before its job began."""
        return self.held.once("manifest.json") if self.location.exists("manifest.json") else {}

    def progress(self) -> dict[str, Any]:
        """Return state, stages with units and rows done, and when this was looked up."""
        return self.held.look("progress", self._progress.read)

    def health(self) -> dict[str, Any]:
        """Return what went wrong so far: events by kind, and the latest."""
        return self.held.look("health", lambda: health(self.location))

    def scores(self) -> list[dict[str, Any]]:
        """Return what each label's scores say of themselves, those in the making with the share that is covered."""
        return [self._describe(label) for label in self.held.labels()]

    def labels(self) -> list[str]:
        """Return the labels of all scores that a job has begun."""
        return self.held.labels()

    def pick(self, scores: str | None) -> str:
        """Return a label that is there; without a name the only one. NotFound, NotReady or ValueError if that fails."""
        found = self.labels()
        if scores is not None:
            self.held.check(scores)
            return scores
        if not found:
            raise NotReady(f"run {self.name} has no scores yet")
        if len(found) > 1:
            raise ValueError(f"run {self.name} has several scores: name one of {', '.join(found)}")
        return found[0]

    def fields(self, scores: str) -> list[str]:
        """Return the fields of the training records that `where` can name: those of one plain value."""
        return self.held.fields(scores)

    def score(self, label: str) -> dict[str, Any]:
        """Return the same of one label. NotFound for one that is not there."""
        self.held.check(label)
        return self._describe(label)

    def queries(
        self, scores: str, *, misclassified: bool | None = None, label: str | None = None, text: str | None = None,
        order: str = "loss", offset: int = 0, limit: int = 50,
    ) -> Page:  # fmt: skip
        """Return queries: the mispredicted first, then by falling loss; or by `order="query"`.

        `label` is the query's own, `text` any part of its text, whatever the case.
        """
        table = self.held.score(scores).queries()
        if text:
            table = table.filter(pa.array(self.held.containing(scores, text)[table["query"].to_numpy()]))
        if label is not None:
            table = table.filter(pc.fill_null(pc.equal(table["label"], label), False))
        if misclassified is not None:
            table = table.filter(pc.fill_null(pc.equal(table["misclassified"], misclassified), False))
        erased = self.held.erased(None, self.held.record(scores)["queries"])
        if erased:
            table = table.filter(pc.invert(pc.is_in(table["query"], pa.array(sorted(erased), pa.int64()))))
        if order == "loss":
            table = table.sort_by([("misclassified", "descending"), ("loss", "descending"), ("query", "ascending")])
        return Page(table.slice(offset, limit).to_pylist(), table.num_rows)

    def query(self, scores: str, query: int) -> dict[str, Any]:
        """Return a query's full record with what the last checkpoint says of it. NotFound if it is not there."""
        found = self.held.score(scores).queries()
        row = found.filter(pc.equal(found["query"], query)).to_pylist()
        if not row:
            raise NotFound(f"scores {scores} have no query {query}: there are {found.num_rows}, from 0")
        record = self.record(self.held.record(scores)["queries"], query)
        return record | row[0]

    def influences(
        self, scores: str, query: int, k: int = 10, side: str | None = None, where: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Return a query's proponents, then its opponents, best first, at most k of each that match every filter."""
        view = self.held.score(scores)
        table = view.influences(query)
        if not table.num_rows and not 0 <= query < self.held.queries(scores).rows:
            raise NotFound(f"scores {scores} have no query {query}: there are {self.held.queries(scores).rows}, from 0")
        if query in self.held.erased(None, self.held.record(scores)["queries"]):
            raise NotFound(f"query {query} was erased")
        keep = self._kept(scores, table["id"].to_numpy(), where or {})
        table = table if keep is None else table.filter(pa.array(keep))
        parts = [table.filter(pc.equal(table["side"], one)).sort_by("rank").slice(0, k) for one in _sides(side)]
        return pa.concat_tables(parts).to_pylist()

    def example(self, scores: str, example: int) -> dict[str, Any]:
        """Return an example's full record with self-influence, total and loss. NotFound if it is not there."""
        record = self.record(self.held.record(scores)["corpus"], example, scores)
        row = self.held.score(scores).examples(np.array([example], dtype=np.int64))
        numbers: dict[str, Any] = row[0] if row else dict.fromkeys((*NUMBERS, "quarantined"))
        return record | {name: numbers[name] for name in (*NUMBERS, "quarantined", *_BRIEF) if name in numbers}

    def example_influences(self, scores: str, example: int, k: int = 10) -> list[dict[str, Any]]:
        """Return the queries in whose top-k an example stands, the strongest first, with what is known of them."""
        self._not_erased(scores, example)
        view = self.held.score(scores)
        rows = view.influenced(example).slice(0, k).to_pylist()
        if not rows and not 0 <= example < self.held.train(scores).rows:
            raise NotFound(
                f"scores {scores} have no example {example}: there are {self.held.train(scores).rows}, from 0"
            )
        asked = view.queries()
        found = asked.filter(pc.is_in(asked["query"], pa.array([row["query"] for row in rows], pa.int64())))
        known = {row["query"]: row for row in found.to_pylist()}
        return [known[row["query"]] | row for row in rows]

    def examples(
        self, scores: str, *, order: str = "self_influence", where: Mapping[str, str] | None = None,
        offset: int = 0, limit: int = 50,
    ) -> Page:  # fmt: skip
        """Return training examples in an order: a number's name, falling; with a minus in front, rising; or `id`.

        Falling self-influence shows suspected label errors; falling total what to keep, rising what to drop.
        """
        places = self.held.order(scores, order)
        ids = self.held.score(scores).ids()[places]
        keep = self._kept(scores, ids, where or {})
        ids = ids if keep is None else ids[keep]
        return Page(self.held.score(scores).examples(ids[offset : offset + limit]), len(ids))

    def histogram(self, scores: str, column: str = "self_influence", bins: int = 40) -> dict[str, Any]:
        """Return edges (bins + 1) and counts of a number over all examples that have it; empty if none has."""
        if column not in NUMBERS:
            raise ValueError(f"column={column!r} is not allowed: one of {', '.join(NUMBERS)}")
        values = self.held.score(scores).numbers(column)
        kept = self._kept(scores, self.held.score(scores).ids(), {})
        values = values[np.isfinite(values) if kept is None else np.isfinite(values) & kept]
        if not len(values):
            return {"edges": [], "counts": []}
        counts, edges = np.histogram(values, bins)
        return {"edges": edges.tolist(), "counts": counts.tolist()}

    def attribute(
        self, scores: str, records: Sequence[str | dict[str, Any]], labels: Sequence[Any] | None = None, k: int = 10
    ) -> list[dict[str, Any]]:
        """Return prediction, label, proponents and opponents of new texts, or of records as the corpus holds them.

        A record may give `token_ids` in place of its text. A label that is None is the model's own prediction.
        NotOnline for a method that cannot, NotReady while the scores are being made, ValueError for a record that the
        task does not take. One call at a time computes.
        """
        about = self.score(scores)
        if not about["online"]:
            raise NotOnline(f"scores {scores} ({about['method']}) cannot answer new text at once: that takes a job")
        if not about["complete"]:
            raise NotReady(f"scores {scores} are being made: {about['covered']:.0%} of the training rows are done")
        with self.held.lock:
            if scores not in self._answerers:
                self._answerers[scores] = Answerer(self.location, scores)
        return self._answerers[scores].ask(records, labels, k)

    def graph(self, scores: str, queries: Sequence[int], k: int = 5) -> dict[str, Any]:
        """Return the bipartite graph of some queries and their k strongest examples on each side."""
        edges = [
            {"query": query, "id": row["id"], "side": row["side"], "score": row["score"], "row": row}
            for query in dict.fromkeys(queries)
            for row in self.influences(scores, query, k)
        ]
        examples = {edge["id"]: {name: edge["row"][name] for name in ("id", *_BRIEF)} for edge in edges}
        table = self.held.score(scores).queries()
        asked = table.filter(pc.is_in(table["query"], pa.array(list(queries), pa.int64()))).to_pylist()
        plain = [{name: value for name, value in edge.items() if name != "row"} for edge in edges]
        return {"queries": asked, "examples": list(examples.values()), "edges": plain}

    def find_query(self, scores: str, query: str) -> int:
        """Return the row of a query given by its row or as `source:ID`. NotFound if there is none."""
        return self.held.find(self.held.queries(scores), query)

    def find_example(self, scores: str, example: str) -> int:
        """Return the id of an example given by it or as `source:ID`. NotFound if there is none."""
        return self.held.find(self.held.train(scores), example)

    def record(self, name: str, row: int, scores: str | None = None) -> dict[str, Any]:
        """Return the full record of a row of the set `name`, plain; the set may lie in the run that `scores` used."""
        return plain_record(self._row(name, row, scores), name)

    def image(self, name: str, row: int, scores: str | None = None) -> bytes:
        """Return the image of a row of the set `name` as PNG. NotFound if it has none."""
        try:
            return png_of(self._row(name, row, scores))
        except LookupError as error:
            raise NotFound(str(error)) from error

    def _row(self, name: str, row: int, scores: str | None) -> dict[str, Any]:
        home = self.held.record(scores)["home"] if scores and self.held.record(scores)["corpus"] == name else None
        corpus = self.held.corpus(home, name)
        if not 0 <= row < corpus.rows:
            raise NotFound(f"set {name} has no row {row}: there are {corpus.rows}, from 0")
        if row in self.held.erased(home, name):
            raise NotFound(f"row {row} of set {name} was erased")
        with self.held.lock:
            return corpus.row(row)

    def _describe(self, label: str) -> dict[str, Any]:
        record, view = self.held.record(label), self.held.score(label)
        method = load_method(record["method"], _frozen(record["method_settings"]))
        return {
            "label": label, "method": record["method"], "method_settings": record["method_settings"],
            "score_unit": method.score_unit, "top_k": record["top_k"], "query_set": record["queries"],
            "queries": self.held.queries(label).rows, "corpus": record["corpus"], "examples": self.held.train(label).rows,
            "checkpoints": record["checkpoints"], "online": bool(method.online and record["stored"]),
            "granularity": self.manifest().get("granularity"), "complete": isinstance(view, FinishedScores),
            "covered": view.covered,
        }  # fmt: skip

    def _not_erased(self, scores: str, example: int) -> None:
        if example in self.held.erased(self.held.record(scores)["home"], self.held.record(scores)["corpus"]):
            raise NotFound(f"example {example} was erased")

    def _kept(self, scores: str, ids: np.ndarray, where: Mapping[str, str]) -> np.ndarray | None:
        """Return which ids match every filter and were not erased; None if all."""
        record = self.held.record(scores)
        erased = self.held.erased(record["home"], record["corpus"])
        keep = ~np.isin(ids, np.fromiter(erased, np.int64)) if erased else None
        for name, value in where.items():
            if name not in self.held.fields(scores):
                raise ValueError(f"where={name}:… is not allowed: one of {', '.join(self.held.fields(scores))}")
            here = self.held.mask(self.held.train(scores), name, value)[ids]
            keep = here if keep is None else keep & here
        return keep


_BRIEF = ("source_id", "label", "snippet")


def _sides(side: str | None) -> tuple[str, ...]:
    if side is not None and side not in SIDES:
        raise ValueError(f"side={side!r} is not allowed: one of {', '.join(SIDES)}")
    return SIDES if side is None else (side,)


def _frozen(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings as its dataclass takes them: JSON turned tuples into lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _name_of(uri: str) -> str:
    parts = [part for part in uri.removeprefix("s3://").split("/") if part]
    name = parts[-2] if len(parts) > 1 and parts[-1] == "run" else parts[-1] if parts else "run"
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip(".") or "run"
