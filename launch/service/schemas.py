"""What the service is asked and answers, as OpenAPI says it. Answers are written directly; these only describe them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Side = Literal["proponent", "opponent"]
Text = Annotated[str, Field(min_length=1, max_length=100_000)]
Label = str | int | float | bool | None


class Brief(BaseModel):
    """What every row shows of an example or a query."""

    source_id: str | None = Field(None, description="the corpus's own id")
    label: str | None = None
    snippet: str | None = Field(None, description="the beginning of its text, at most 300 characters")


class Query(Brief):
    """A stored query. `predicted` and `misclassified` are null where the task predicts no label."""

    query: int
    predicted: str | None = Field(description="of the last checkpoint")
    misclassified: bool | None
    loss: float | None = Field(description="of the last checkpoint")


class FullQuery(Query):
    """A stored query with all fields of its record."""

    model_config = ConfigDict(extra="allow")
    id: int


class Influence(Brief):
    """One training example's influence on a query. Positive: training on it lowered the query's loss."""

    side: Side
    rank: int = Field(description="from 0, on its side, before any filter")
    id: int
    score: float


class Influenced(Query):
    """A query in whose top-k an example stands."""

    side: Side
    rank: int
    score: float


class Example(Brief):
    """A training example with what is known of it; numbers are null while they are not."""

    id: int
    self_influence: float | None
    total: float | None = Field(description="sum of its scores over all queries of the set")
    loss: float | None = Field(description="at the last checkpoint")
    quarantined: bool | None


class FullExample(Example):
    """A training example with all fields of its record; an image is {"image": "<set>/<id>"}."""

    model_config = ConfigDict(extra="allow")


class Queries(BaseModel):
    rows: list[Query]
    total: int
    offset: int
    limit: int


class Examples(BaseModel):
    rows: list[Example]
    total: int
    offset: int
    limit: int


class Influences(BaseModel):
    rows: list[Influence]
    query: int
    scores: str
    score_unit: str
    covered: float = Field(description="share of the training rows that these scores have seen")


class InfluencedQueries(BaseModel):
    rows: list[Influenced]
    id: int
    scores: str
    score_unit: str
    covered: float


class Histogram(BaseModel):
    edges: list[float]
    counts: list[int]


class Edge(BaseModel):
    query: int
    id: int
    side: Side
    score: float


class Node(Brief):
    id: int


class Graph(BaseModel):
    queries: list[Query]
    examples: list[Node]
    edges: list[Edge]


class Scores(BaseModel):
    """What a label's scores say of themselves."""

    label: str
    method: str
    method_settings: dict[str, Any]
    score_unit: str
    top_k: int
    query_set: str
    queries: int
    corpus: str
    examples: int
    checkpoints: list[str]
    online: bool = Field(description="whether POST attribute answers at once")
    granularity: str | None
    complete: bool
    covered: float
    fields: list[str] = Field(description="what `where` can name")


class Stage(BaseModel):
    stage: str
    done: int
    units: int
    rows: int
    damaged: int  # units to be made anew


class Progress(BaseModel):
    state: Literal["waiting", "running", "finished", "stalled"]
    stages: list[Stage]
    updated: str


class Health(BaseModel):
    events: dict[str, int]
    latest: list[dict[str, Any]]


class RunBrief(BaseModel):
    name: str
    state: Literal["waiting", "running", "finished", "stalled"]
    scores: list[str]


class Runs(BaseModel):
    runs: list[RunBrief]


class Run(BaseModel):
    name: str
    manifest: dict[str, Any] = Field(description="{} before the job began")
    progress: Progress
    health: Health
    scores: list[Scores]


class Question(BaseModel):
    """New texts, token ids, or records as the corpus holds them: exactly one of the three."""

    model_config = ConfigDict(extra="forbid")
    texts: list[Text] | None = None
    token_ids: list[list[Annotated[int, Field(ge=0, le=2**31)]]] | None = None
    records: list[dict[str, Any]] | None = None
    labels: list[Label] | None = Field(None, description="one each, null or none: the model's own prediction")

    @model_validator(mode="after")
    def _one_kind(self) -> "Question":
        given = [value for value in (self.texts, self.token_ids, self.records) if value is not None]
        if len(given) != 1 or not given[0]:
            raise ValueError("give exactly one of texts, token_ids and records, and at least one of it")
        if self.labels is not None and len(self.labels) != len(given[0]):
            raise ValueError(f"{len(self.labels)} labels for {len(given[0])} questions: give one each, or none")
        return self

    def rows(self) -> list[str | dict[str, Any]]:
        """Return the questions as the catalog takes them."""
        if self.token_ids is not None:
            return [{"token_ids": ids} for ids in self.token_ids]
        return list(self.texts or self.records or [])


class Found(Brief):
    id: int
    score: float


class Answer(BaseModel):
    prediction: Label
    label: Label
    proponents: list[Found]
    opponents: list[Found]


class Answers(BaseModel):
    scores: str
    score_unit: str
    answers: list[Answer]


class Job(BaseModel):
    """A question that takes a job. `answers` come with state finished."""

    job: str
    url: str
    state: Literal["waiting", "running", "finished", "failed", "stalled"]
    detail: str | None = Field(description="why it failed")
    progress: Progress | None
    answers: list[Answer] | None


class Healthz(BaseModel):
    status: Literal["ok"]
    runs: int
