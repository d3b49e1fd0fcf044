"""The arguments that routes have in common, and what their answers have in common in the OpenAPI document."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Path, Query, Request

from launch.service.answers import ARROW
from launch.service.catalog import RunView
from launch.service.problems import Responses, documented
from launch.service.work import Service

MOST_K = 1000  # neighbours a side
MOST_ROWS = 500  # of a page of a list
MOST_NODES = 50  # queries of a graph, and neighbours a side of each

RunName = Annotated[str, Path(max_length=200, description="name of a run, as /v1/runs lists them")]
Row = Annotated[str, Path(pattern=r"^([0-9]{1,15}|source:.{1,300})$", description="row from 0, or source:ID")]
Number = Annotated[int, Path(ge=0, le=10**15)]
Label = Annotated[str | None, Query(max_length=300, description="which scores; may be left out if there is one label")]
K = Annotated[int, Query(ge=1, le=MOST_K, description="at most so many on each side")]
Offset = Annotated[int, Query(ge=0, le=2**40)]
Limit = Annotated[int, Query(ge=1, le=MOST_ROWS)]
Where = Annotated[
    list[str] | None, Query(max_length=8, description="field:value of the training records; several must all hold")
]
SIDES = {"positive": "proponent", "negative": "opponent", None: None}  # by the sign of the score

READING = documented(400, 401, 404, 409, 413, 422, 503, 504)
LISTING: Responses = {200: {"content": {ARROW: {"schema": {"type": "string", "format": "binary"}}}}, **READING}
PICTURE: Responses = {200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}, **READING}

Found = TypeVar("Found")


async def ask(request: Request, run: str, find: Callable[[RunView], Found]) -> Found:
    """Return what is found in a run, looked up in a thread."""
    service: Service = request.app.state.service
    return await service.ask(lambda: find(service.catalog.run(run)))


def pairs(where: list[str] | None) -> dict[str, str]:
    """Return `field:value` filters by field. ValueError for another form, or a field named twice."""
    found = {}
    for one in where or []:
        name, colon, value = one.partition(":")
        if not colon or name in found:
            raise ValueError(f"where={one!r} is not allowed: field:value, each field once")
        found[name] = value
    return found


def of_scores(run: RunView, label: str) -> dict[str, Any]:
    """Return what an answer says of the scores it is from."""
    meta = run.score(label)
    return {"scores": label, "score_unit": meta["score_unit"], "covered": meta["covered"]}
