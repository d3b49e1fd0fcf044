"""The routes under /v1 that take questions about new input, answered at once or by a job."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from launch.service import schemas
from launch.service.answers import answer
from launch.service.arguments import READING, K, Label, RunName, ask
from launch.service.catalog import RunView
from launch.service.errors import Busy, NotOnline
from launch.service.problems import Responses, documented
from launch.service.work import Service

router = APIRouter(prefix="/v1")
ASKING: Responses = {
    202: {"model": schemas.Job, "description": "It takes a job: see its URL"},
    **READING,
    **documented(403, 408, 429),
}


@router.post("/runs/{run}/attribute", response_model=schemas.Answers, responses=ASKING, tags=["new input"])
async def attribute(
    request: Request, run: RunName, question: schemas.Question, scores: Label = None, k: K = 10
) -> Response:
    """Return prediction, proponents and opponents of new texts, token ids or records.

    Scores that are not `online` answer 202 with a job's URL; only an admin may start one.
    """
    service: Service = request.app.state.service
    rows = question.rows()
    if len(rows) > service.limits.texts:
        raise ValueError(f"{len(rows)} questions are not allowed: at most {service.limits.texts} at once")

    def about(view: RunView) -> tuple[RunView, dict[str, Any]]:
        return view, view.score(view.pick(scores))

    view, meta = await ask(request, run, about)
    try:
        found = await service.compute(lambda: view.attribute(meta["label"], rows, question.labels, k))
    except NotOnline:
        return await start_job(request, view, meta["label"], rows, question.labels)
    return answer({"scores": meta["label"], "score_unit": meta["score_unit"], "answers": found})


async def start_job(
    request: Request, view: RunView, label: str, rows: list[str | dict[str, Any]], labels: list[Any] | None
) -> Response:
    """Start the job of a question that cannot be answered at once, and say where its state is."""
    service: Service = request.app.state.service
    if request.scope["role"] != "admin":
        raise HTTPException(403, f"scores {label} take a job to answer, which only an admin's token may start")
    try:
        job = await service.ask(lambda: service.board.submit(view, label, rows, labels))
    except Busy as busy:
        raise HTTPException(429, str(busy), {"Retry-After": "60"}) from None
    state = await service.ask(lambda: service.board.state(view, job, 10))
    url = f"/v1/runs/{view.name}/jobs/{job}"
    response = answer({"job": job, "url": url, **state}, 202)
    response.headers["Location"] = url
    return response


@router.get("/runs/{run}/jobs/{job}", response_model=schemas.Job, responses=READING, tags=["new input"])
async def job_state(
    request: Request, run: RunName, job: Annotated[str, Path(pattern="^[0-9a-f]{16}$")], k: K = 10
) -> Response:
    """Return how a job is doing, and once it is finished its answers."""
    board = request.app.state.service.board
    state = await ask(request, run, lambda view: board.state(view, job, k))
    return answer({"job": job, "url": f"/v1/runs/{run}/jobs/{job}", **state})
