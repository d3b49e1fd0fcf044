"""The application: routes, problems, guard and metrics around a catalog. Stateless: every process reads the runs itself."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from fastapi import Depends, FastAPI
from fastapi.responses import RedirectResponse, Response
from fastapi.security import HTTPBearer

from launch.service import questions, routes
from launch.service.answers import answer
from launch.service.auth import Tokens
from launch.service.catalog import Catalog
from launch.service.guard import LOOPBACK, Guard, Limits
from launch.service.metrics import Metrics
from launch.service.problems import Problem, Responses, documented, handle_problems
from launch.service.schemas import Healthz
from launch.service.work import Service

SETTINGS = "INFLUENCE_SERVICE"  # the settings as JSON, for processes that uvicorn starts
DESCRIPTION = (
    "Which training examples moved a prediction, and by how much. Positive scores: training on the example lowered the "
    "query's loss (a proponent). Lists answer as JSON, or as an Arrow stream where the request accepts that."
)


COUNTERS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(400, 401, 413)}


@dataclass(frozen=True)
class Settings:
    """What a service is started with. Plain: it travels to other processes."""

    runs: list[str]
    tokens: str | None = None  # file of token hashes; None: whoever reaches the port may ask
    hosts: tuple[str, ...] = LOOPBACK  # host names it answers to; empty: all
    page: bool = False  # also serve the page, in one process only
    limits: Limits = field(default_factory=Limits)


def create_app(settings: Settings) -> FastAPI:
    """Return the application over the given runs."""
    catalog, metrics = Catalog(settings.runs), Metrics()
    tokens = Tokens(Path(settings.tokens)) if settings.tokens else None
    service = Service(catalog, settings.limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="Influence engine", version="1", description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Guard, limits=settings.limits, tokens=tokens, hosts=tuple(settings.hosts), metrics=metrics)
    handle_problems(app)
    app.state.service = service
    needed = [Depends(HTTPBearer(auto_error=False))] if tokens else None
    for router in (routes.router, questions.router):
        app.include_router(router, dependencies=needed)

    @app.get("/healthz", response_model=Healthz, responses=documented(400, 413), tags=["service"])
    async def healthz() -> Response:
        """Say that the service is up. Needs no token and tells nothing of a run."""
        return answer({"status": "ok", "runs": len(catalog.names)})

    @app.get(
        "/metrics", response_class=Response, tags=["service"], dependencies=needed,
        responses=COUNTERS,
    )  # fmt: skip
    async def numbers() -> Response:
        """Return the service's counters as Prometheus reads them."""
        return metrics.page()

    if settings.page:
        from launch.page import mount_page  # the UI package is slow to import, and only needed here

        mount_page(app, service, lambda token: tokens is None or bool(token and tokens.role(token)))
        app.get("/", include_in_schema=False)(lambda: RedirectResponse("/page/queries"))
    _describe_problems(app)
    return app


def from_environment() -> FastAPI:
    """Return the application of the settings that the starting process left in the environment."""
    given = orjson.loads(os.environ[SETTINGS])
    return create_app(Settings(**given | {"limits": Limits(**given["limits"])}))


def to_environment(settings: Settings) -> None:
    """Leave the settings for the processes that are started from here."""
    os.environ[SETTINGS] = orjson.dumps(asdict(settings)).decode()


def _describe_problems(app: FastAPI) -> None:
    """Put the schema of a problem into the OpenAPI document, to which every route's responses point."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        return document

    app.openapi = described  # type: ignore[method-assign]
