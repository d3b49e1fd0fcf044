"""What a run holds at the moment: its labels, corpora, filters and scores, looked up again at most once a second."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actors.index import Fields
from launch.service.errors import NotFound, NotReady
from launch.service.scores import NUMBERS, FinishedScores, PartialScores, Scores, shown_by
from storage.corpus import Corpus
from storage.index import ScoreIndex
from storage.locations import Location

EVERY = 1.0  # seconds between two looks at a run
MASKS = 16  # filters of the training side kept, one byte an example each


class Holdings:
    """One run's objects as they are asked for again and again. Threads may share it."""

    def __init__(self, location: Location, clock: Callable[[], float] = time.monotonic) -> None:
        self.location, self.clock, self.lock = location, clock, threading.RLock()
        self._looked: dict[str, tuple[float, Any]] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._corpora: dict[tuple[str, str], tuple[list[str], Corpus]] = {}
        self._scores: dict[str, Scores] = {}
        self._masks: dict[tuple[str, ...], np.ndarray] = {}
        self._orders: dict[tuple[str, str], np.ndarray] = {}

    def labels(self) -> list[str]:
        """Return the labels of all scores that a job has begun."""
        keys = self.look("stages", lambda: self.location.list("stages"))
        return sorted(key.removeprefix("stages/score-").removesuffix(".json") for key in keys if "/score-" in key)

    def record(self, label: str) -> dict[str, Any]:
        """Return what the score stage was declared with."""
        self.check(label)
        return self.once(f"stages/score-{label}.json")

    def score(self, label: str) -> Scores:
        """Return a label's scores: the finished index, or the shards done so far."""
        record = self.record(label)
        with self.lock:
            held = self._scores.get(label)
            if isinstance(held, FinishedScores):
                return held
            self._scores[label] = self.look(f"scores {label}", lambda: self._reopen(label, record, held))
            return self._scores[label]

    def _reopen(self, label: str, record: dict[str, Any], held: Scores | None) -> Scores:
        """Return the finished index if there is one by now, else the shards done so far."""
        if self.location.exists(f"index/{label}/meta.json"):
            return FinishedScores(ScoreIndex.open(self.location, label), self.queries(label))
        if isinstance(held, PartialScores):
            return held.refreshed()
        corpora = (self.train(label), self.queries(label))
        return PartialScores(self.location, label, record, *corpora, self.shown(label)).refreshed()

    def shown(self, label: str) -> Fields:
        """Return the fields that answers show: as the index says, or before there is one as the task would."""
        held = self._scores.get(label)
        if isinstance(held, FinishedScores) and "fields" in held.index.meta:
            return Fields(**held.index.meta["fields"])
        return shown_by(self.record(label)["model"])

    def train(self, label: str) -> Corpus:
        return self.corpus(self.record(label)["home"], self.record(label)["corpus"])

    def queries(self, label: str) -> Corpus:
        return self.corpus(None, self.record(label)["queries"])

    def fields(self, scores: str) -> list[str]:
        """Return the fields of the training records that `where` can name: those of one plain value."""
        schema = self.train(scores).schema()
        return [field.name for field in schema if _is_plain(field.type)]

    def order(self, scores: str, order: str) -> np.ndarray:
        """Return the places of all examples in an order; those without the number stand last."""
        name = order.removeprefix("-")
        if name not in (*NUMBERS, "id"):
            raise ValueError(f"order={order!r} is not allowed: {', '.join(NUMBERS)}, with - for rising, or id")
        view = self.score(scores)
        if name == "id":
            places = np.arange(len(view.ids()))
            return places[::-1] if order.startswith("-") else places
        held = self._orders.get((scores, order))
        if held is None or not isinstance(view, FinishedScores):
            values = view.numbers(name)
            held = np.argsort(values if order.startswith("-") else -values, kind="stable")  # NaN last either way
            if isinstance(view, FinishedScores):
                self._orders[scores, order] = held
        return held

    def corpus(self, home: str | None, name: str) -> Corpus:
        """Return a set of this run, or of the run `home`, as it is now. NotFound or NotReady if it is not there yet."""
        place = Location.parse(home) if home else self.location
        keys = self.look(f"sets {place.uri}", lambda: place.list("corpus"))
        ours = [key for key in keys if key.split("/")[1] == name and key.endswith("/segment.json")]
        with self.lock:
            held = self._corpora.get((place.uri, name))
            if held and held[0] == ours:
                return held[1]
            if not ours:
                there = sorted({key.split("/")[1] for key in keys if key.endswith("/segment.json")})
                raise NotFound(f"this run has no set {name!r}: there are {', '.join(there) or 'none yet'}")
            try:
                self._corpora[place.uri, name] = (ours, Corpus.open(place, name))
            except FileNotFoundError as error:
                raise NotReady(f"set {name!r} is still being read in") from error
            return self._corpora[place.uri, name][1]

    def erased(self, home: str | None, name: str) -> set[int]:
        """Return the ids that every answer leaves out."""
        corpus = self.corpus(home, name)
        return self.look(f"erased {corpus.run.uri} {name}", Corpus(corpus.run, name, corpus.segments).erased)

    def find(self, corpus: Corpus, given: str) -> int:
        """Return the row of a set given by it or as `source:ID`. NotFound if there is none."""
        if not given.startswith("source:"):
            return int(given)
        try:
            with self.lock:
                return corpus.find(given.removeprefix("source:"))
        except ValueError as error:
            raise NotFound(str(error)) from error

    def mask(self, corpus: Corpus, name: str, value: str) -> np.ndarray:
        """Return bool [N]: which rows have this value in a field. Cost: one scan of its column, the latest are kept."""
        key = (corpus.run.uri, corpus.name, corpus.fingerprint, name, value)
        with self.lock:
            if key not in self._masks:
                parts = [
                    pc.fill_null(pc.equal(pc.cast(batch.column(0), pa.string()), value), False)
                    for batch in corpus.column(name)
                ]
                self._masks[key] = np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts])
                if len(self._masks) > MASKS:
                    self._masks.pop(next(iter(self._masks)))
            return self._masks[key]

    def containing(self, scores: str, text: str) -> np.ndarray:
        """Return bool [Q]: which queries contain the text, in whatever case."""
        name = self.shown(scores).text
        corpus = self.queries(scores)
        if name not in corpus.schema().names or not pa.types.is_string(corpus.schema().field(name).type):
            raise ValueError(f"text={text!r} is not allowed: these queries have no text")
        with self.lock:
            found = [
                pc.fill_null(pc.match_substring(batch.column(0), text, ignore_case=True), False)
                for batch in corpus.column(name)
            ]
        return np.concatenate([part.to_numpy(zero_copy_only=False) for part in found])

    def check(self, label: str) -> None:
        """Raise NotFound for scores that no job has begun."""
        if label not in self.labels():
            there = ", ".join(self.labels()) or "none yet"
            raise NotFound(f"this run has no scores {label!r}: there are {there}")

    def once(self, key: str) -> dict[str, Any]:
        """Return a JSON object that never changes once it is there."""
        if key not in self._records:
            self._records[key] = self.location.read_json(key)
        return self._records[key]

    def look(self, what: str, find: Callable[[], Any]) -> Any:
        """Return what was found less than a second ago, else look again."""
        with self.lock:
            now = self.clock()
            if what not in self._looked or now - self._looked[what][0] >= EVERY:
                self._looked[what] = (now, find())
            return self._looked[what][1]


def _is_plain(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(test(kind) for test in tests)
