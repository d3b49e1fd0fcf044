"""The routes under /v1 that read. Each takes its arguments, asks the catalog in a thread, and answers as JSON or Arrow."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from launch.service import schemas
from launch.service.answers import EXAMPLES, INFLUENCED, INFLUENCES, QUERIES, answer, listing
from launch.service.arguments import (
    LISTING,
    MOST_NODES,
    PICTURE,
    READING,
    SIDES,
    K,
    Label,
    Limit,
    Number,
    Offset,
    Row,
    RunName,
    Where,
    ask,
    of_scores,
    pairs,
)
from launch.service.catalog import Page, RunView
from launch.service.problems import documented
from launch.service.work import Service

router = APIRouter(prefix="/v1")
Listed = tuple[list[dict[str, Any]], dict[str, Any]]  # rows, and what is said of them all


@router.get("/runs", response_model=schemas.Runs, responses=documented(400, 401, 413, 503, 504), tags=["runs"])
async def runs(request: Request) -> Response:
    """List the runs with their state and the labels of their scores."""
    service: Service = request.app.state.service

    def find() -> list[dict[str, Any]]:
        views = [service.catalog.run(name) for name in service.catalog.names]
        return [{"name": v.name, "state": v.progress()["state"], "scores": v.labels()} for v in views]

    return answer({"runs": await service.ask(find)})


@router.get("/runs/{run}", response_model=schemas.Run, responses=READING, tags=["runs"])
async def one_run(request: Request, run: RunName) -> Response:
    """Return a run's manifest, progress, health and scores."""

    def find(view: RunView) -> dict[str, Any]:
        scores = [about | {"fields": view.fields(about["label"])} for about in view.scores()]
        found = {"manifest": view.manifest(), "progress": view.progress(), "health": view.health()}
        return {"name": view.name, **found, "scores": scores}

    return answer(await ask(request, run, find))


@router.get("/runs/{run}/images/{set}/{id}", response_class=Response, responses=PICTURE, tags=["runs"])
async def image(
    request: Request, run: RunName, set: Annotated[str, Path(max_length=200)], id: Number, scores: Label = None
) -> Response:
    """Return the image of a query or example as PNG; records name it {"image": "<set>/<id>"}."""
    png = await ask(request, run, lambda view: view.image(set, id, scores))
    return Response(png, media_type="image/png")


@router.get("/runs/{run}/queries", response_model=schemas.Queries, responses=LISTING, tags=["queries"])
async def queries(
    request: Request, run: RunName, scores: Label = None, misclassified: bool | None = None,
    label: Annotated[str | None, Query(max_length=300, description="the query's own label")] = None,
    text: Annotated[str | None, Query(max_length=1000, description="part of its text, any case")] = None,
    order: Literal["loss", "query"] = "loss", offset: Offset = 0, limit: Limit = 50,
) -> Response:  # fmt: skip
    """List queries: the mispredicted first, then by falling loss."""

    def find(view: RunView) -> Page:
        return view.queries(
            view.pick(scores), misclassified=misclassified, label=label, text=text, order=order, offset=offset,
            limit=limit,
        )  # fmt: skip

    page = await ask(request, run, find)
    return listing(request, page.rows, QUERIES, total=page.total, offset=offset, limit=limit)


@router.get("/runs/{run}/queries/{id}", response_model=schemas.FullQuery, responses=READING, tags=["queries"])
async def query(request: Request, run: RunName, id: Row, scores: Label = None) -> Response:
    """Return a query's record with what the last checkpoint says of it."""

    def find(view: RunView) -> dict[str, Any]:
        label = view.pick(scores)
        return view.query(label, view.find_query(label, id))

    return answer(await ask(request, run, find))


@router.get(
    "/runs/{run}/queries/{id}/influences", response_model=schemas.Influences, responses=LISTING, tags=["queries"]
)
async def influences(
    request: Request, run: RunName, id: Row, scores: Label = None, k: K = 10,
    sign: Annotated[Literal["positive", "negative"] | None, Query(description="of the score; both if left out")] = None,
    where: Where = None,
) -> Response:  # fmt: skip
    """Return a query's proponents (positive scores), then its opponents, best first."""

    def find(view: RunView) -> Listed:
        label = view.pick(scores)
        number = view.find_query(label, id)
        rows = view.influences(label, number, k, SIDES[sign], pairs(where))
        return rows, of_scores(view, label) | {"query": number}

    rows, about = await ask(request, run, find)
    return listing(request, rows, INFLUENCES, **about)


@router.get("/runs/{run}/graph", response_model=schemas.Graph, responses=READING, tags=["queries"])
async def graph(
    request: Request, run: RunName,
    query: Annotated[list[Annotated[int, Query(ge=0, le=10**15)]], Query(min_length=1, max_length=MOST_NODES)],
    scores: Label = None, k: Annotated[int, Query(ge=1, le=MOST_NODES)] = 5,
) -> Response:  # fmt: skip
    """Return the bipartite graph of some queries and their k strongest examples on each side."""
    return answer(await ask(request, run, lambda view: view.graph(view.pick(scores), query, k)))


@router.get("/runs/{run}/examples/{id}", response_model=schemas.FullExample, responses=READING, tags=["examples"])
async def example(request: Request, run: RunName, id: Row, scores: Label = None) -> Response:
    """Return an example's record with self-influence, total and loss."""

    def find(view: RunView) -> dict[str, Any]:
        label = view.pick(scores)
        return view.example(label, view.find_example(label, id))

    return answer(await ask(request, run, find))


@router.get(
    "/runs/{run}/examples/{id}/influences", response_model=schemas.InfluencedQueries, responses=LISTING,
    tags=["examples"],
)  # fmt: skip
async def influenced(request: Request, run: RunName, id: Row, scores: Label = None, k: K = 10) -> Response:
    """Return the queries in whose top-k an example stands: which it helped (positive) or hurt, the strongest first."""

    def find(view: RunView) -> Listed:
        label = view.pick(scores)
        number = view.find_example(label, id)
        return view.example_influences(label, number, k), of_scores(view, label) | {"id": number}

    rows, about = await ask(request, run, find)
    return listing(request, rows, INFLUENCED, **about)


@router.get("/runs/{run}/examples", response_model=schemas.Examples, responses=LISTING, tags=["examples"])
async def examples(
    request: Request, run: RunName, scores: Label = None, where: Where = None, offset: Offset = 0, limit: Limit = 50,
    order: Literal["id", "-id", "self_influence", "-self_influence", "total", "-total", "loss", "-loss"] = "id",
) -> Response:  # fmt: skip
    """List training examples. Numbers fall, with a minus in front they rise; `id` rises."""

    def find(view: RunView) -> Page:
        return view.examples(view.pick(scores), order=order, where=pairs(where), offset=offset, limit=limit)

    page = await ask(request, run, find)
    return listing(request, page.rows, EXAMPLES, total=page.total, offset=offset, limit=limit)


@router.get("/runs/{run}/self-influence", response_model=schemas.Examples, responses=LISTING, tags=["examples"])
async def self_influence(
    request: Request, run: RunName, scores: Label = None, where: Where = None, offset: Offset = 0, limit: Limit = 50
) -> Response:
    """List training examples by falling self-influence: at the top stand suspected label errors."""
    return await examples(request, run, scores, where, offset, limit, "self_influence")


@router.get("/runs/{run}/totals", response_model=schemas.Examples, responses=LISTING, tags=["examples"])
async def totals(
    request: Request, run: RunName, scores: Label = None, where: Where = None, offset: Offset = 0, limit: Limit = 50,
    want: Literal["keep", "drop"] = "drop",
) -> Response:  # fmt: skip
    """List training examples by total over the query set: what to drop (harmful first) or to keep (helpful first)."""
    return await examples(request, run, scores, where, offset, limit, "-total" if want == "drop" else "total")


@router.get("/runs/{run}/histogram", response_model=schemas.Histogram, responses=READING, tags=["examples"])
async def histogram(
    request: Request, run: RunName, scores: Label = None,
    column: Literal["self_influence", "total", "loss"] = "self_influence",
    bins: Annotated[int, Query(ge=1, le=1000)] = 40,
) -> Response:  # fmt: skip
    """Return how a number is distributed over the training examples; both lists are empty if none has it."""
    return answer(await ask(request, run, lambda view: view.histogram(view.pick(scores), column, bins)))
