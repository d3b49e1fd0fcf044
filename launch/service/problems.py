"""Errors as RFC 9457 problem details: status, title, and a detail that says what was seen and what is allowed."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from launch.service.answers import to_json
from launch.service.errors import NotFound, NotReady

MEDIA = "application/problem+json"
Responses = dict[int | str, dict[str, Any]]  # of a route, as OpenAPI describes them
LOG = logging.getLogger("influence.service")
TITLES = {
    400: "Bad request", 401: "Who is asking?", 403: "Not allowed", 404: "Not there", 405: "Method not allowed",
    408: "The request took too long to arrive", 409: "Not made yet", 413: "Too large", 422: "A value is not allowed",
    429: "Too many at once", 500: "A bug of ours", 503: "The storage does not answer", 504: "It took too long",
}  # fmt: skip


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str = Field("about:blank", description="kind of problem; none has a page of its own")
    title: str = Field(description="the kind in words")
    status: int = Field(description="the HTTP status again")
    detail: str = Field(description="value seen, what is allowed, what to do next")


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response of a problem."""
    body = Problem(type="about:blank", title=TITLES.get(status, "Error"), status=status, detail=detail)
    return Response(to_json(body.model_dump()), status, dict(headers or {}), MEDIA)


def documented(*statuses: int) -> Responses:
    """Return these problems as OpenAPI responses of a route."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {s: {"description": TITLES[s], "content": {MEDIA: {"schema": schema}}} for s in statuses}


def handle_problems(app: FastAPI) -> None:
    """Turn every error of a route into a problem; nothing of a bug's traceback leaves the log."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        parts = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5]]
        return problem(422, "; ".join(parts))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(NotFound)
    async def missing(_: Request, error: NotFound) -> Response:
        return problem(404, str(error))

    @app.exception_handler(NotReady)
    async def early(_: Request, error: NotReady) -> Response:
        return problem(409, str(error), {"Retry-After": "10"})

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> Response:
        return problem(422, str(error))

    @app.exception_handler(TimeoutError)
    async def late(_: Request, __: TimeoutError) -> Response:
        return problem(504, "the answer took longer than this service waits: ask for less, or later")

    @app.exception_handler(OSError)
    async def unread(request: Request, error: OSError) -> Response:
        LOG.error("%s %s: %s", request.method, request.url.path, error)
        return problem(503, "the run could not be read: try again", {"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "this is a bug: the service's log says more")
