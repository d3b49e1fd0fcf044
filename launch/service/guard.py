"""What stands before every route: host names, tokens, size and patience for bodies, and the count of what was answered.

Plain ASGI, so that it costs little and also guards the page's sockets.
"""

import asyncio
import time
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.service.auth import Tokens, given_token
from launch.service.metrics import Metrics
from launch.service.problems import problem

GUARDED = ("/v1", "/metrics")  # need a token where there are tokens; the page asks for one by itself
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    body: int = 1 << 20  # bytes
    texts: int = 32  # of one POST attribute
    waiting: int = 4  # POST attribute computed or waiting; one computes at a time
    seconds: float = 60.0  # until an answer is there
    patience: float = 10.0  # seconds until a body has arrived


class Guard:
    """Middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, limits: Limits, tokens: Tokens | None, hosts: tuple[str, ...], metrics: Metrics
    ) -> None:
        self.app, self.limits, self.tokens, self.hosts, self.metrics = app, limits, tokens, hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is None:
                await self.app(scope, self._limited(receive) if scope["type"] == "http" else receive, counted)
            elif scope["type"] == "http":
                await refusal(scope, receive, counted)
            else:
                await send({"type": "websocket.close", "code": 1008})
        finally:
            route = getattr(scope.get("route"), "path", "other")
            if scope["type"] == "http":
                self.metrics.answered(route, scope["method"], status, time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the problem of a request that may not pass, else None, and the role in `scope["role"]`."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.hosts and _host(headers.get(b"host", "")) not in self.hosts:
            return problem(400, f"this service is known as {', '.join(self.hosts)}: use one of these host names")
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > self.limits.body:
            return problem(413, f"a body may have {self.limits.body} bytes")
        scope["role"] = "admin"
        if self.tokens is None or not scope["path"].startswith(GUARDED):
            return None
        token = given_token(headers.get(b"authorization"))
        role = self.tokens.role(token) if token else None
        if role is None:
            return problem(401, "send a valid token: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})
        scope["role"] = role
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that ends with 413 or 408 for a body that is too large or too slow."""
        size, ended, late = 0, False, time.monotonic() + self.limits.patience

        async def limited() -> Message:
            nonlocal size, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, late - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, f"the body must arrive within {self.limits.patience:g} s") from None
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > self.limits.body:
                raise HTTPException(413, f"a body may have {self.limits.body} bytes")
            return message

        return limited


def _host(value: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].lower()
