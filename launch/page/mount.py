"""Puts the page on the service's app, under /page: every view, the login, images and the export."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated

import nicegui
from fastapi import FastAPI, Form, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse, StreamingResponse
from nicegui import ui
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.page import ask, cleanse, graph, neighbours, progress, queries
from launch.page.frame import STYLE, VIEWS, Page, framed
from launch.page.parts import box, card, heading, notice
from launch.page.selection import export, select
from launch.page.state import State, address
from launch.service.catalog import Catalog, NotReady
from launch.service.work import Service

MOUNTED = "/page"
COOKIE = "influence_token"
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><g stroke="#2c5f8a" stroke-width="1.5">'
    '<path d="M3 4 13 8M3 12 13 8M3 8 13 8"/></g><g fill="#1d766a"><circle cx="3" cy="4" r="2"/>'
    '<circle cx="3" cy="8" r="2"/><circle cx="3" cy="12" r="2"/></g><circle cx="13" cy="8" r="2.5" fill="#b3502b"/></svg>'
)
# The UI package writes its start-up script into the page and compiles its templates in the browser.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}
SHOW: dict[str, Callable[[Page], Awaitable[None]]] = {
    "queries": queries.show,
    "query": neighbours.show_query,
    "example": neighbours.show_example,
    "examples": cleanse.show,
    "graph": graph.show,
    "ask": ask.show,
    "progress": progress.show,
}
Allowed = Callable[[str | None], bool]  # may this token, or none, read?


def mount_page(app: FastAPI, service: Service, allowed: Allowed) -> None:
    """Serve the page under /page of an app that runs in one process. Once per process."""
    for view in SHOW:
        title = "Influence · " + VIEWS.get(view, view.capitalize())
        ui.page(f"/{view}", title=title, response_timeout=60)(opened(view, service, allowed))
    ui.page("/login", title="Influence · Log in")(login_page)
    pages = nicegui.app
    pages.get("/", include_in_schema=False)(lambda: RedirectResponse(f"{MOUNTED}/queries"))
    pages.post("/login")(log_in(allowed))
    pages.get("/image")(image(service.catalog, allowed))
    pages.get("/export")(exported(service, allowed))
    pages.add_middleware(SafeHeaders)
    ui.run_with(
        app, mount_path=MOUNTED, favicon=ICON, dark=None, language="en-US", tailwind=False, show_welcome_message=False
    )


class SafeHeaders:
    """Adds the headers that keep a browser from loading or running anything from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; the answer's start carries the headers."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def opened(view: str, service: Service, allowed: Allowed) -> Callable[[Request], Awaitable[Response | None]]:
    """Return the handler of one view: first the token, then an address that says everything, then the view."""

    async def page(request: Request) -> Response | None:
        state = State(view, dict(request.query_params))
        if not allowed(request.cookies.get(COOKIE)):
            return RedirectResponse(address("login", {"next": state.change()}))
        found = await asyncio.to_thread(look_up, service, state)
        if found.state != state:
            return RedirectResponse(found.state.change())
        with framed(found):
            try:
                await SHOW[view](found)
            except (LookupError, ValueError, NotReady) as error:
                ui.context.client.status_code = 404
                notice(str(error), "bad")
        return None

    return page


def look_up(service: Service, state: State) -> Page:
    """Return the run and the scores that the address names; what it leaves out or misnames becomes the first there is."""
    name, catalog = state.values.get("run", ""), service.catalog
    run = catalog.run(name if name in catalog.names else catalog.names[0])
    scores = run.scores()
    meta = next((s for s in scores if s["label"] == state.values.get("scores")), scores[0] if scores else None)
    named = {"run": run.name} | ({"scores": str(meta["label"])} if meta else {})
    return Page(service, State(state.view, {**state.values, **named}), run, scores, meta)


def login_page(request: Request) -> None:
    """Show the field for a token. It is sent as a plain form and kept in a cookie that ends with the browser."""
    ui.add_css(STYLE)
    ui.colors(primary="#2c5f8a")
    with box("div", "main login"), card():
        heading("Log in", "this service shows its runs to holders of a token")
        if "wrong" in request.query_params:
            notice("This token is not known here.", "bad")
        with box("form", "filters", method="post", action="login"):
            ui.input("Token", password=True).props("outlined dense name=token autofocus autocomplete=current-password")
            box("input", type="hidden", name="next", value=request.query_params.get("next", ""))
            ui.button("Log in").props("type=submit unelevated no-caps")


def log_in(allowed: Allowed) -> Callable[..., Response]:
    """Return the handler of the login form."""

    def check(request: Request, token: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "") -> Response:
        if not allowed(token):
            return RedirectResponse(address("login", {"next": next, "wrong": 1}), 303)
        view, _, rest = next.partition("?")
        answer = RedirectResponse(f"{view}?{rest}" if view in SHOW else "queries", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure, path=MOUNTED)
        return answer

    return check


def image(catalog: Catalog, allowed: Allowed) -> Callable[..., Response]:
    """Return the handler that gives out an example's image as PNG."""

    def answer(request: Request, run: str, scores: str, set: str, id: int) -> Response:
        if not allowed(request.cookies.get(COOKIE)):
            return PlainTextResponse("log in first", 401)
        try:
            return Response(catalog.run(run).image(set, id, scores), media_type="image/png")
        except LookupError as error:
            return PlainTextResponse(str(error), 404)

    return answer


def exported(service: Service, allowed: Allowed) -> Callable[..., Response]:
    """Return the handler that gives out the list of examples kept or dropped."""

    def answer(request: Request, which: str = "kept", form: str = "csv") -> Response:
        if not allowed(request.cookies.get(COOKIE)):
            return PlainTextResponse("log in first", 401)
        if which not in ("kept", "dropped") or form not in ("csv", "jsonl"):
            return PlainTextResponse("which must be kept or dropped, form csv or jsonl", 422)
        page = look_up(service, State("export", dict(request.query_params)))
        if page.meta is None:
            return PlainTextResponse("the run has no scores yet", 404)
        lines: Iterator[str] = export(page.run, page.label, select(page.run, page.label, page.state), which, form)
        headers = {"Content-Disposition": f'attachment; filename="{which}.{form}"'}
        kind = "text/csv" if form == "csv" else "application/jsonl"
        return StreamingResponse(lines, media_type=kind, headers=headers)

    return answer
