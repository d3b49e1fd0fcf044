"""api-fuzz: generated requests over the whole API. No crash, no undocumented answer, and nothing that lets a stranger in.

`schema` lets schemathesis generate valid and invalid requests from the OpenAPI document, and checks every answer against
it. `tokens` sends wrong tokens, `paths` names that try to leave the given runs, `sizes` bodies and numbers beyond the
limits. The application runs in this process, over a run made by the real job; a file beside the run holds a mark that no
answer may contain. "Let in" is an answer with that mark, a 2xx to a wrong token, or a 2xx beyond a limit.
"""

import asyncio
import base64
import itertools
import logging
import string
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.result import Err
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.experiments.registry import Experiment, Gate
from launch.experiments.service_run import small_run
from launch.service.app import Settings, create_app
from launch.service.auth import add_token
from launch.service.guard import Limits

MARK = "the-mark-that-no-answer-may-hold"
HERE = {"run": "reviews", "id": "1", "set": "train"}
LABELS = ("online", "offline")
SECRET = "secret.txt"  # beside the run
KINDS = ("schema", "tokens", "paths", "sizes")
TRICKS = (
    "..", "../..", "../secret.txt", "..%2f..", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%252f..%252fsecret.txt",
    "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "....//....//secret.txt", "..\\..\\secret.txt", "..%5c..",
    "reviews%00", "%00", "file:///etc/passwd", "s3://other/run", "package:storage/", "~", ".", "%c0%ae%c0%ae/", "*",
    "reviews/../reviews",
    "journal", "jobs", "../reviews", "%ff%fe", "‥/‥", "con", "a" * 5000,
)  # fmt: skip


class Tap:
    """Counts every answer of an application by status, and those that hold the mark."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.statuses, self.marked = app, Counter[int](), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            self.marked += MARK.encode() in message.get("body", b"")
            await send(message)

        try:
            await self.app(scope, receive, counted if scope["type"] == "http" else send)
        except Exception:  # once 500 is answered, Starlette passes the error on to the server's log
            if not self.statuses[500]:
                raise


def cells(config: dict[str, Any]) -> list[str]:
    return [f"{kind}-{seed}" for kind in KINDS for seed in config["seeds"]]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Serve a run, send one kind of requests, and return how often each status came and what was wrong."""
    kind, _, number = cell.rpartition("-")
    with served(config) as (tap, token):
        if kind == "schema":
            wrong = send_generated(tap, token, config, int(number))
            let_in: list[str] = []
        else:
            wrong = []
            let_in = SENDERS[kind](
                TestClient(tap, "http://localhost", raise_server_exceptions=False), token, config, int(number)
            )
        marked = ["the mark was in an answer"] * tap.marked
    return {"statuses": {str(k): v for k, v in sorted(tap.statuses.items())}, "wrong": wrong, "let_in": let_in + marked}


@contextmanager
def served(config: dict[str, Any]) -> Iterator[tuple[Tap, str]]:
    """Give the application over a small run, with tokens, and a token that may read."""
    quiet = logging.getLogger("influence.service")
    level, quiet.disabled = quiet.disabled, True
    run = small_run(config)
    (run.parent / SECRET).write_text(MARK)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens.json")
        token = add_token(tokens, "reader", "read")
        limits = Limits(body=config["body"], texts=4)
        app = create_app(Settings([str(run)], str(tokens), ("localhost", "testserver"), limits=limits))
        try:
            yield Tap(app), token
        finally:
            app.state.service.close()
            quiet.disabled = level


def send_generated(tap: Tap, token: str, config: dict[str, Any], number: int) -> list[str]:
    """Send `examples` valid and as many invalid requests to every route, or to those whose names end as `routes` say.

    Return what answers were not as documented.
    """
    schema = schemathesis.openapi.from_asgi("/openapi.json", tap)
    wrong: list[str] = []
    for found in schema.get_all_operations():
        if isinstance(found, Err):
            raise ValueError(f"the OpenAPI document is not right: {found.err()}")
        operation = found.ok()
        if not operation.path.endswith(tuple(config["routes"])):
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.POSITIVE or has_input(operation):
                wrong += send_to(operation, mode, token, config["examples"], number)
    return wrong


def has_input(operation: APIOperation) -> bool:
    return bool(list(operation.iter_parameters()) or operation.body)


def send_to(operation: APIOperation, mode: GenerationMode, token: str, examples: int, number: int) -> list[str]:
    """Send generated requests to one route, and return a line for each kind of answer that breaks its description.

    Three of four name what is there, so that they come to more than a 404. What the description cannot say, that a text
    is in the model's classes or tokens, may be refused: `positive_data_acceptance` is not asked.
    """
    wrong: list[str] = []
    aims = mode is GenerationMode.POSITIVE and any(p.name == "scores" for p in operation.iter_parameters())
    turn = itertools.count()
    quick = settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @seed(number)
    @quick
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        if next(turn) % 4:  # else the drawn names stay
            case.path_parameters = {name: HERE.get(name, value) for name, value in (case.path_parameters or {}).items()}
            case.query = {**(case.query or {}), "scores": LABELS[next(turn) % 2]} if aims else case.query
        response = case.call(headers={"Authorization": f"Bearer {token}"})
        may_be_taken = response.status_code == 413 or not still_invalid(case)
        refused: list[Any] = [negative_data_rejection] if may_be_taken else []
        excluded = [positive_data_acceptance, *refused]
        try:
            case.validate_response(response, excluded_checks=excluded)
        except (Failure, FailureGroup) as failure:
            inner = failure.exceptions if isinstance(failure, FailureGroup) else [failure]
            wrong.extend(f"{operation.label}: {type(one).__name__}: {str(one)[:300]}" for one in inner)

    send()
    return sorted(set(wrong))


def still_invalid(case: Case) -> bool:
    """Tell whether a request is against the description in more than what is sent otherwise: its names and its token.

    schemathesis does not count 413 as a refusal either; that it is documented is checked all the same.
    """
    drawn = case.meta.components if case.meta else {}
    wrong = {where for where, part in drawn.items() if part.mode is GenerationMode.NEGATIVE}
    return bool(wrong - {ParameterLocation.PATH, ParameterLocation.HEADER})


def send_tokens(client: TestClient, token: str, config: dict[str, Any], number: int) -> list[str]:
    """Send tokens that are nearly right, and wrong ones; return those that were taken."""
    draw = np.random.default_rng(number)
    let_in = []
    for _ in range(config["requests"]):
        given_token = wrong_token(draw, token)
        header = str(draw.choice(["Bearer {}", "bearer  {}", "Basic {}", "{}", "Token {}"])).format(given_token)
        if header.strip().lower() == f"bearer {token}".lower():
            continue
        path = str(draw.choice(["/v1/runs", "/metrics", "/v1/runs/reviews/queries/0/influences?scores=online"]))
        status = client.get(path, headers=[(b"Authorization", header.encode("latin-1", "replace"))]).status_code
        let_in += [f"token {header!r} was taken"] if status < 300 else []
    return let_in


def wrong_token(draw: np.random.Generator, token: str) -> str:
    """Return a token that is not valid: another secret, another name, one character less, or noise."""
    name, _, secret = token.partition(".")
    place = int(draw.integers(len(secret)))
    noise = "".join(draw.choice(list(string.printable[:95]), size=int(draw.integers(0, 60))))
    changed = secret[:place] + ("a" if secret[place] != "a" else "b") + secret[place + 1 :]
    kinds = (
        f"{name}.{changed}", f"other.{secret}", f"{name}.{secret[:-1]}", f"{name}.{secret}x", name, f"{name}.", secret,
        f".{secret}", noise, base64.b64encode(f"reader:{noise}".encode()).decode(), f"{name}.{noise}",
    )  # fmt: skip
    return str(kinds[int(draw.integers(len(kinds)))])


def send_paths(client: TestClient, token: str, config: dict[str, Any], number: int) -> list[str]:
    """Send names and ids that try to leave the run; return those that were answered with a 2xx."""
    draw = np.random.default_rng(number)
    routes = (
        "/v1/runs/{}", "/v1/runs/{}/queries", "/v1/runs/reviews/images/{}/0?scores=online", "/v1/runs/reviews/images/train/{}",
        "/v1/runs/reviews/queries/{}?scores=online", "/v1/runs/reviews/examples/{}/influences?scores=online",
        "/v1/runs/reviews/jobs/{}",
        "/v1/runs/reviews/queries?scores={}", "/v1/runs/reviews/examples?scores=online&where={}:x", "/v1/{}", "/{}", "/page/{}",
    )  # fmt: skip
    let_in = []
    for _ in range(config["requests"]):
        parts = [str(draw.choice(TRICKS)) for _ in range(int(draw.integers(1, 4)))]
        trick = str(draw.choice(["/", "%2f", ""])).join(parts)
        trick = quote(trick, safe="") if draw.random() < 0.5 else quote(trick, safe="/%\\*~:")
        address = str(draw.choice(routes)).format(trick)
        status = asyncio.run(sent_as_it_is(client.app, address, token))
        let_in += [f"{address} was answered"] if status < 300 else []
    return let_in


async def sent_as_it_is(app: ASGIApp, address: str, token: str) -> int:
    """Return the status of a GET whose path nobody has tidied up: a client would resolve its dots."""
    path, _, query = address.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {token}".encode())],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    statuses = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

    await app(scope, receive, send)
    return statuses[0]


def send_sizes(client: TestClient, token: str, config: dict[str, Any], number: int) -> list[str]:
    """Send bodies and numbers beyond the limits; return those that were answered with a 2xx."""
    draw = np.random.default_rng(number)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    let_in = []
    for _ in range(config["requests"]):
        big = 10 ** int(draw.integers(4, 40))
        name = str(draw.choice(["k", "limit", "offset", "bins", "body", "texts", "deep"]))
        if name == "body":
            text = b"x" * (config["body"] + int(draw.integers(1, 1000)))
            response = client.post(
                "/v1/runs/reviews/attribute?scores=online", content=b'{"texts": ["' + text + b'"]}', headers=headers
            )
        elif name == "texts":
            asked = {"texts": ["a film"] * int(draw.integers(5, 50))}
            response = client.post("/v1/runs/reviews/attribute?scores=online", json=asked, headers=headers)
        elif name == "deep":
            nested = b"[" * int(draw.integers(1000, 20_000))
            response = client.post("/v1/runs/reviews/attribute?scores=online", content=nested, headers=headers)
        else:
            route = {"k": "queries/0/influences", "bins": "histogram"}.get(name, "examples")
            response = client.get(f"/v1/runs/reviews/{route}?scores=online&{name}={big}", headers=headers)
        within = name == "offset" and big <= 2**40  # an empty page
        let_in += [f"{name}={big} was answered"] if response.status_code < 300 and not within else []
    return let_in


SENDERS = {"tokens": send_tokens, "paths": send_paths, "sizes": send_sizes}


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Return requests, crashes, undocumented answers and strangers let in, over all cells."""
    statuses = Counter[str]()
    for result in done.values():
        statuses.update(result["statuses"])
    crashes = sum(count for status, count in statuses.items() if status.startswith("5"))
    return [
        Gate("requests", sum(statuses.values()), threshold=config["least"]),
        Gate("5xx", crashes, threshold=0, at_least=False),
        Gate("undocumented", sum(len(result["wrong"]) for result in done.values()), threshold=0, at_least=False),
        Gate("let in", sum(len(result["let_in"]) for result in done.values()), threshold=0, at_least=False),
    ]


EXPERIMENT = Experiment(
    "api-fuzz",
    "generated requests, wrong tokens, path tricks and sizes find no way in and no crash",
    5,
    cells,
    run_cell,
    gates,
)
