"""Stage 4: merge the shards' scores into the index that answers queries. One shard is held at a time."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from actors.prepare import answers_key
from actors.score import ShardScores, load_shard
from actors.specs import ModelSpec, ScoreSpec
from actors.standard_errors import merged_errors
from actors.states import load_state, state_key
from engine.topk import TopK, merge, without
from storage.corpus import Corpus
from storage.gradients import QUARANTINED
from storage.index import SIDES, write_index
from storage.locations import Location
from storage.segments import ROW_GROUP

SNIPPET = 300  # characters
ERROR = "standard_error"  # a column of what is a mean over checkpoints
THROUGH = ("through_finetuned", "through_shared")  # columns of multi-stage influence: its two parts
_TABLE_ROWS = 16_384
_BRIEF = [("source_id", pa.string()), ("label", pa.string()), ("snippet", pa.string())]
_BY_QUERY = pa.schema(
    [("query", pa.int64()), ("query_source_id", pa.string()), ("side", pa.string()), ("rank", pa.int64()),
     ("id", pa.int64()), ("score", pa.float64()), *_BRIEF]
)  # fmt: skip
_QUERIES = pa.schema(
    [("query", pa.int64()), ("predicted", pa.string()), ("misclassified", pa.bool_()), ("loss", pa.float64()), *_BRIEF]
)
_BY_EXAMPLE = pa.schema(
    [("id", pa.int64()), ("self_influence", pa.float64()), ("total", pa.float64()), ("loss", pa.float64()),
     ("quarantined", pa.bool_()), *_BRIEF]
)  # fmt: skip


@dataclass(frozen=True)
class Fields:
    """Which fields of a record an index row shows."""

    text: str = "text"
    label: str = "label"


@dataclass(frozen=True)
class IndexJob:
    """What the index is built from."""

    run: Location
    model: ModelSpec
    score: ScoreSpec
    score_unit: str
    granularity: str
    projection: dict[str, Any]
    shards: list[dict[str, Any]]
    fields: Fields
    about: dict[str, Any] = field(default_factory=dict)  # what a method's own stages say of these scores

    @property
    def home(self) -> Location:
        return Location.parse(self.score.home) if self.score.home else self.run


def build_index(job: IndexJob, meta: dict[str, Any] | None = None) -> None:
    """Merge every query's top-k over the shards in id order and write all tables with the scores' description."""
    top = merged_top(job)
    errors = merged_errors(top, ((shard.top, shard.errors) for shard in _shards(job)))
    through = merged_errors(top, ((shard.top, shard.through_own) for shard in _shards(job)))
    train = Corpus.open(job.home, job.score.corpus)
    queries = Corpus.open(job.run, job.score.queries)
    write_index(
        job.run, job.score.label, meta or describe(job), by_query(top, train, queries, job.fields, errors, through),
        by_example(job, train),
        query_tables(job.run, job.score.label, job.score.checkpoints[-1], queries, job.fields),
    )  # fmt: skip


def merged_top(job: IndexJob) -> TopK:
    """Return every query's top-k over all shards, erased examples left out."""
    top: TopK | None = None
    for shard in _shards(job):
        top = shard.top if top is None else merge(top, shard.top, job.score.top_k)
    assert top is not None
    return without(top, Corpus.open(job.home, job.score.corpus).erased())


def describe(job: IndexJob) -> dict[str, Any]:
    """Return what every stored score says of itself."""
    return {
        "method": job.score.method, "method_settings": job.score.method_settings, "score_unit": job.score_unit,
        "sign": "positive: training on the example lowered the query's loss (a proponent)",
        "granularity": job.granularity, "projection": job.projection,
        "queries": job.score.queries, "corpus": job.score.corpus, "corpus_home": job.score.home,
        "checkpoints": [vars(job.model.checkpoint(name)) for name in job.score.checkpoints],
        "checkpoint_choice": [vars(verdict) for verdict in job.model.choice],
        "self_influence": "sum over checkpoints of weight · exact squared gradient norm",
        "top_k": job.score.top_k, "fields": asdict(job.fields), "totals": "sum over all queries of the set", "damping": None,
    } | job.about  # fmt: skip


def by_query(
    top: TopK,
    train: Corpus,
    queries: Corpus,
    fields: Fields,
    errors: np.ndarray | None = None,
    through: np.ndarray | None = None,
) -> Iterator[pa.Table]:
    """Yield rows of some queries at a time: proponents then opponents, best first, with a snippet of the example.

    `errors`, [2, Q, k]: the scores' standard errors, which make one more column. `through`, [2, Q, k]: what of the scores
    goes through weights that only fine-tuning has; it makes two, that and the rest, through the weights that both have.
    """
    schema = _BY_QUERY if errors is None else _BY_QUERY.append(pa.field(ERROR, pa.float64()))
    for name in () if through is None else THROUGH:
        schema = schema.append(pa.field(name, pa.float64()))
    briefs = find_briefs(train, np.unique(top.ids), fields)
    asked = find_briefs(queries, np.arange(top.ids.shape[1]), fields)
    count, k = top.ids.shape[1:]
    step = max(1, _TABLE_ROWS // (2 * max(1, k)))
    for begin in range(0, count, step):
        rows = []
        for query in range(begin, min(begin + step, count)):
            for side, name in enumerate(SIDES):
                for rank, (example, score) in enumerate(
                    zip(top.ids[side, query], top.scores[side, query], strict=True)
                ):
                    if not belongs(name, score):
                        continue
                    place = {"query": query, "query_source_id": asked[query]["source_id"], "side": name, "rank": rank}
                    more = {} if errors is None else {ERROR: float(errors[side, query, rank])}
                    if through is not None:
                        own = float(through[side, query, rank])
                        more |= dict(zip(THROUGH, (own, float(score) - own), strict=True))
                    rows.append(place | {"id": int(example), "score": float(score), **briefs[int(example)]} | more)
        yield pa.Table.from_pylist(rows, schema=schema)


def query_tables(
    run: Location, label: str, last_checkpoint: str, queries: Corpus, fields: Fields
) -> Iterator[pa.Table]:
    """Yield one segment's queries at a time: what the last checkpoint answers, its loss, label and snippet.

    A run whose queries were prepared before answers were kept has the losses alone.
    """
    answers = query_answers(run, label, last_checkpoint, queries.rows)
    for segment in queries.segments:
        rows = []
        for offset, record in enumerate(queries.read(segment, 0, segment.rows)):
            answer = answers[segment.base + offset]
            given = None if answer["predicted"] is None else str(answer["predicted"])
            rows.append({"query": segment.base + offset, **answer, "predicted": given, **brief(record, fields)})
        yield pa.Table.from_pylist(rows, schema=_QUERIES)


def query_answers(run: Location, label: str, last_checkpoint: str, count: int) -> list[dict[str, Any]]:
    """Return loss, predicted and misclassified of every query, as `prepare` left them; None for what it did not leave."""
    losses: list[float | None] = [None] * count
    try:
        return run.read_json(answers_key(label))
    except FileNotFoundError:  # not prepared yet, or before answers were kept
        if run.exists(state_key(label, last_checkpoint)):
            losses = load_state(run, label, last_checkpoint).losses.tolist()
    return [{"loss": loss, "predicted": None, "misclassified": None} for loss in losses]


def by_example(job: IndexJob, train: Corpus) -> Iterator[pa.Table]:
    """Yield one shard's examples at a time, in id order, erased ones left out."""
    segments = {s.name: s for s in train.segments}
    for piece, shard in zip(job.shards, _shards(job), strict=True):
        records = train.read(segments[piece["segment"]], piece["start"], piece["stop"])
        ids = segments[piece["segment"]].base + np.arange(piece["start"], piece["stop"], dtype=np.int64)
        scored = np.searchsorted(ids, shard.ids)
        numbers = {"self_influence": shard.self_influence, "total": shard.totals, "loss": shard.losses}
        schema = _BY_EXAMPLE
        for name, errors in (("total", shard.total_errors), ("self_influence", shard.self_errors)):
            if errors is not None:
                numbers[f"{name}_{ERROR}"] = errors
                schema = schema.append(pa.field(f"{name}_{ERROR}", pa.float64()))
        if (through := shard.total_through_own) is not None:
            for name, values in zip(THROUGH, (through, shard.totals - through), strict=True):
                numbers[f"total_{name}"] = values
                schema = schema.append(pa.field(f"total_{name}", pa.float64()))
        numbers = {name: spread(values, scored, len(ids), np.nan) for name, values in numbers.items()}
        columns: dict[str, Any] = {"id": ids}
        columns |= {name: pa.array(values, from_pandas=True) for name, values in numbers.items()}  # NaN -> null
        columns["quarantined"] = spread(shard.state == QUARANTINED, scored, len(ids), False)
        briefs = [brief(record, job.fields) for record in records]
        columns |= {name: [b[name] for b in briefs] for name in ("source_id", "label", "snippet")}
        kept = pa.array(~np.isin(ids, list(train.erased())))
        yield pa.Table.from_pydict(columns, schema=schema).filter(kept)


def spread(values: np.ndarray, places: np.ndarray, length: int, fill: Any) -> np.ndarray:
    """Return an array of this length with the values at their places: those of examples that were no candidates."""
    out = np.full(length, fill, dtype=values.dtype)
    out[places] = values
    return out


def belongs(side: str, score: float) -> bool:
    """Tell whether the score's sign is that of the side: a proponent's is positive, an opponent's negative."""
    return score > 0 if side == "proponent" else score < 0


def find_briefs(corpus: Corpus, ids: np.ndarray, fields: Fields) -> dict[int, dict[str, Any]]:
    """Return the brief of every given id, reading each row group that holds one once."""
    found: dict[int, dict[str, Any]] = {}
    for segment in corpus.segments:
        inside = ids[(ids >= segment.base) & (ids < segment.base + segment.rows)] - segment.base
        for group in np.unique(inside // ROW_GROUP):
            here = inside[inside // ROW_GROUP == group]
            first = int(here[0])
            records = corpus.read(segment, first, int(here[-1]) + 1)
            found |= {segment.base + int(i): brief(records[int(i) - first], fields) for i in here}
    return found


def brief(record: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """Return what an index row shows of an example: the corpus's own id, its label and the beginning of its text."""
    text, label = record.get(fields.text), record.get(fields.label)
    text = text if isinstance(text, str) else ""
    return {
        "source_id": str(record["source_id"]),
        "label": str(label) if isinstance(label, str | int | float | np.number) else None,
        "snippet": text if len(text) <= SNIPPET else text[: SNIPPET - 1] + "…",
    }


def _shards(job: IndexJob) -> Iterator[ShardScores]:
    for piece in job.shards:
        yield load_shard(job.run, job.score.label, job.score.corpus, piece)
