"""A run from Python: what was scored, and answers to new questions.

from launch import Run
run = Run.open("runs/demo")
run.top(17, k=5)                   # a stored query's proponents and opponents, an Arrow table
run.score(["a new sentence"])      # the same for text the run has never seen

Stored answers are read without torch; what needs a model imports it where it is called.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from launch.collapse import collapse_rows
from storage.corpus import Corpus
from storage.index import ScoreIndex
from storage.locations import Location
from storage.run_format import check_format

if TYPE_CHECKING:
    from actors.specs import CheckpointSpec
    from engine.methods.contract import QueryState
    from launch.online import Answer, Setting
    from launch.tokens import TokenScores


class Run:
    """A run that has been scored, in part or whole. Make it with `Run.open`."""

    def __init__(self, location: Location) -> None:
        check_format(location)
        self.location = location
        self.labels = ScoreIndex.labels(location)
        if not self.labels:
            raise FileNotFoundError(f"{location.uri} holds no scores: run launch/score.py, or check the path")

    @classmethod
    def open(cls, uri: str) -> Run:
        """Open a folder or S3 prefix. Raises FileNotFoundError if nothing has been scored there."""
        return cls(Location.parse(uri))

    def index(self, scores: str | None = None) -> ScoreIndex:
        """Return the index of one label; without a name the only one. Raises ValueError if there are several."""
        if scores is None and len(self.labels) > 1:
            raise ValueError(f"{self.location.uri} holds several scores: name one of {', '.join(self.labels)}")
        label = scores or self.labels[0]
        if label not in self.labels:
            raise ValueError(f"scores {label!r} are not in {self.location.uri}: there are {', '.join(self.labels)}")
        return ScoreIndex.open(self.location, label)

    def corpus(self, index: ScoreIndex) -> Corpus:
        """Return the scored examples of an index: this run's, or those of the run whose store was scored against."""
        home = index.meta["corpus_home"]
        return Corpus.open(Location.parse(home) if home else self.location, index.meta["corpus"])

    def queries(self, index: ScoreIndex) -> Corpus:
        """Return the stored queries of an index."""
        return Corpus.open(self.location, index.meta["queries"])

    def top(self, query: int | str, k: int = 10, scores: str | None = None, collapse: bool = False) -> pa.Table:
        """Return the k strongest proponents and opponents of a stored query: side, rank, id, score, label, snippet.

        `query` is its row, 0 … Q − 1, or `source:ID` with the corpus's own id. `collapse` shows near-identical examples
        once, as the strongest, with the ids of the others in `near_identical`; k then counts groups, and a side of
        which output.top_k kept fewer has fewer.
        """
        index = self.index(scores)
        kept = index.meta["top_k"]
        if k > kept:
            raise ValueError(f"top {k} is not allowed: scores {index.label} keep {kept} (output.top_k)")
        sides = index.top(self.query_row(query, index), kept if collapse and k > 0 else k)
        if collapse:
            corpus, field = self.corpus(index), index.meta["fields"]["text"]
            schema = sides[0].schema.append(pa.field("near_identical", pa.list_(pa.int64())))
            groups = [collapse_rows(side.to_pylist(), corpus, field, k).rows for side in sides]
            sides = tuple(pa.Table.from_pylist(rows, schema) for rows in groups)
        return pa.concat_tables(sides)

    def query_row(self, query: int | str, index: ScoreIndex) -> int:
        """Return the row of a query given by row or `source:ID`. Raises ValueError saying what there is."""
        corpus = self.queries(index)
        if isinstance(query, str) and query.startswith("source:"):
            return corpus.find(query.removeprefix("source:"))
        try:
            row = int(query)
        except ValueError:
            row = -1
        if not 0 <= row < corpus.rows:
            raise ValueError(f"query {query!r} is not there: rows 0 to {corpus.rows - 1}, or source:ID")
        return row

    def states(self, scores: str | None = None) -> list[QueryState]:
        """Return what was prepared of the stored queries, one state per checkpoint in order of training."""
        from actors.states import load_state

        index = self.index(scores)
        names = [checkpoint["name"] for checkpoint in index.meta["checkpoints"]]
        return [load_state(self.location, index.label, name) for name in names]

    def score(
        self,
        texts: list[str],
        labels: list[Any] | None = None,
        k: int = 10,
        scores: str | None = None,
        exact: bool = False,
        collapse: bool = False,
    ) -> list[Answer]:
        """Return the proponents and opponents of new texts, each under its given label or the model's own prediction.

        A neighbour index answers if the last job over these scores asked for one (`output.neighbours`); `exact` scans
        the store all the same. `collapse` as in `top`.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts={texts!r} is one text: give a list, [{texts!r}]")
        from launch.online import text_field

        setting = self.setting(scores)
        field = text_field(setting)
        return self.ask([{field: text} for text in texts], labels, k, setting, exact, collapse)

    def ask(
        self,
        records: list[dict[str, Any]],
        labels: list[Any] | None = None,
        k: int = 10,
        setting: Setting | None = None,
        exact: bool = False,
        collapse: bool = False,
    ) -> list[Answer]:
        """Return the same for records as the corpus holds them, their labels replaced by those given or predicted."""
        from actors.neighbours import EXACT, chosen_search
        from launch.online import refuse_offline, score_records, with_labels

        setting = setting or self.setting()
        refuse_offline(setting)
        kind = EXACT if exact else chosen_search(self.location, setting.score.label)
        records = with_labels(setting, records, labels)
        if not collapse or k < 1:
            return score_records(setting, records, k, kind)
        found = score_records(setting, records, max(k, setting.score.top_k), kind)
        return [self._collapsed(answer, setting, k) for answer in found]

    def _collapsed(self, answer: Answer, setting: Setting, k: int) -> Answer:
        sides = (
            collapse_rows(rows, setting.corpus, setting.fields.text, k)
            for rows in (answer.proponents, answer.opponents)
        )
        proponents, opponents = sides
        return replace(answer, proponents=proponents.rows, opponents=opponents.rows)

    def tokens(self, query: int | str | dict[str, Any], ids: list[int], scores: str | None = None) -> list[TokenScores]:
        """Return what each token of these training examples contributes to its example's score for a query.

        `query` is a stored one as in `top`, or a record as the corpus holds them. For tasks whose loss is a sum over
        tokens. Raises ValueError for the others, and for an example that is not there.
        """
        from launch.online import prepare_records
        from launch.tokens import losses_by_token, token_scores

        setting = self.setting(scores)
        losses_by_token(setting)
        if isinstance(query, dict):
            return token_scores(setting, prepare_records(setting, [query]), 0, ids)
        row = self.query_row(query, self.index(scores))
        states = dict(zip(setting.score.checkpoints, self.states(scores), strict=True))
        return token_scores(setting, states, row, ids)

    def checkpoints(self) -> tuple[CheckpointSpec, ...]:
        """Return the run's checkpoints in order of training."""
        from launch.online import read_checkpoints

        return read_checkpoints(self.location)

    def setting(self, scores: str | None = None) -> Setting:
        """Return what is needed to answer a new query as the stored ones were answered."""
        from launch.online import read_setting

        return read_setting(self.location, self.index(scores))
