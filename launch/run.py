"""A run from Python: what was scored, and answers to new questions.

from launch import Run
run = Run.open("runs/demo")
run.top(17, k=5)                   # a stored query's proponents and opponents, an Arrow table
run.score(["a new sentence"])      # the same for text the run has never seen
"""

from typing import Any

import pyarrow as pa

from actors.context import WorkerContext
from actors.index import Fields
from actors.neighbours import built_kinds
from actors.specs import CheckpointSpec, GradientSpec, ModelSpec, ScoreSpec
from actors.states import load_state
from engine.methods.contract import QueryState, load_method
from engine.projection import Projection
from launch.online import Answer, Setting, predicted_label, score_records
from storage.corpus import Corpus
from storage.index import ScoreIndex
from storage.locations import Location


class Run:
    """A run that has been scored, in part or whole. Make it with `Run.open`."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.labels = ScoreIndex.labels(location)
        if not self.labels:
            raise FileNotFoundError(f"{location.uri} holds no scores: run launch/score.py, or check the path")

    @classmethod
    def open(cls, uri: str) -> "Run":
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

    def top(self, query: int | str, k: int = 10, scores: str | None = None) -> pa.Table:
        """Return the k strongest proponents and opponents of a stored query: side, rank, id, score, label, snippet.

        `query` is its row, 0 … Q − 1, or `source:ID` with the corpus's own id.
        """
        index = self.index(scores)
        if k > index.meta["top_k"]:
            raise ValueError(f"top {k} is not allowed: scores {index.label} keep {index.meta['top_k']} (output.top_k)")
        proponents, opponents = index.top(self.query_row(query, index), k)
        return pa.concat_tables([proponents, opponents])

    def query_row(self, query: int | str, index: ScoreIndex) -> int:
        """Return the row of a query given by row or `source:ID`. Raises ValueError saying what there is."""
        corpus = Corpus.open(self.location, index.meta["queries"])
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
    ) -> list[Answer]:
        """Return the proponents and opponents of new texts, each under its given label or the model's own prediction.

        The label's neighbour index answers if it has one; `exact` scans the store all the same.
        """
        setting = self.setting(scores)
        task = setting.context.task(setting.model)
        field = getattr(task, "text_field", None)
        if field is None:
            raise ValueError(
                f"task {setting.model.task} reads no text: store such queries in a query set and run score.py"
            )
        return self.ask([{field: text} for text in texts], labels, k, setting, exact)

    def ask(
        self,
        records: list[dict[str, Any]],
        labels: list[Any] | None = None,
        k: int = 10,
        setting: Setting | None = None,
        exact: bool = False,
    ) -> list[Answer]:
        """Return the same for records as the corpus holds them, their labels replaced by those given or predicted."""
        setting = setting or self.setting()
        label_field = getattr(setting.context.task(setting.model), "label_field", None)
        if labels and not label_field:
            raise ValueError(f"task {setting.model.task} takes no label: leave it out")
        if label_field:
            chosen = labels or [predicted_label(setting, record) for record in records]
            records = [record | {label_field: label} for record, label in zip(records, chosen, strict=True)]
        kinds = [] if exact else built_kinds(self.location, setting.score.label)
        return score_records(setting, records, k, kinds[0] if kinds else "exact")

    def checkpoints(self) -> tuple[CheckpointSpec, ...]:
        """Return the run's checkpoints in order of training."""
        records = [self.location.read_json(key) for key in self.location.list("checkpoints")]
        found = [CheckpointSpec(**{k: v for k, v in record.items() if k != "hash"}) for record in records]
        return tuple(sorted(found, key=lambda checkpoint: checkpoint.step))

    def setting(self, scores: str | None = None) -> Setting:
        """Return what is needed to answer a new query as the stored ones were answered."""
        index = self.index(scores)
        record = self.location.read_json(f"stages/score-{index.label}.json")
        model = ModelSpec(**record["model"], checkpoints=self.checkpoints())
        g = record["gradients"]
        gradients = GradientSpec(tuple(g["parameters"]), Projection(**g["projection"]), g["norms"], g["token_budget"])
        fields = {k: v for k, v in record.items() if k in ScoreSpec.__dataclass_fields__}
        fields["checkpoints"] = tuple(fields["checkpoints"])
        fields["method_settings"] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields["method_settings"].items()
        }
        score = ScoreSpec(label=index.label, **fields)
        method = load_method(score.method, score.method_settings)
        if not (method.online and score.stored):
            raise ValueError(
                f"scores {index.label} cannot answer a new text at once: they were made without a store. "
                f"Put it into a query set and run score.py, or score with gradients.store=true."
            )
        return Setting(
            WorkerContext(self.location.uri),
            model,
            gradients,
            score,
            method,
            int(record["shard_rows"]),
            Fields(**index.meta["fields"]),
        )
