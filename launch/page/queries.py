"""The list of queries, mispredicted first."""

import asyncio
from typing import Any

from nicegui import ui

from launch.page.frame import Page, scored
from launch.page.parts import box, go, heading, link, notice, number, passage, picture, say, verdict
from launch.page.state import State

ON_A_PAGE = 50
SHOWN = {"": "all, mispredicted first", "yes": "mispredicted", "no": "predicted correctly"}
ORDERS = {"": "by loss", "query": "as in the query set"}


async def show(page: Page) -> None:
    """Show the queries that the filters in the address let through."""
    heading("Queries", "the predictions this run explains")
    if not scored(page):
        return
    state = page.state
    at = state.whole("page", 1, 1, 10**9)
    found = await asyncio.to_thread(
        page.run.queries,
        page.label,
        misclassified={"yes": True, "no": False}.get(state.values.get("mispredicted", "")),
        label=state.get("label"),
        text=state.get("text"),
        order="query" if state.get("order") == "query" else "loss",
        offset=(at - 1) * ON_A_PAGE,
        limit=ON_A_PAGE,
    )
    filters(state)
    first = (at - 1) * ON_A_PAGE
    if not found.total:
        notice("No query matches. Take a filter away to see more.")
        return
    images = bool(found.rows) and await asyncio.to_thread(page.has_images, page.query_set, found.rows[0]["query"])
    say(f"{first + 1}–{first + len(found.rows)} of {found.total}", "muted", "p")
    with box("ol", "list", start=first + 1):
        for row in found.rows:
            entry(page, row, images)
    turn_pages(state, at, found.total, ON_A_PAGE)


def filters(state: State) -> None:
    """Show what can be filtered; a change opens the address that says it."""
    with box("div", "filters", role="search", aria_label="Filter queries"):
        choice(state, "mispredicted", "Show", SHOWN)
        choice(state, "order", "Order", ORDERS)
        entry_field(state, "label", "Label")
        entry_field(state, "text", "Text contains")


def choice(state: State, name: str, title: str, options: dict[str, str]) -> None:
    """Let the reader choose one of several values of the address."""
    value = state.values.get(name, "")
    select = ui.select(
        options,
        value=value if value in options else "",
        label=title,
        on_change=lambda e: go(state.change(**{name: e.value, "page": None})),
    )
    select.props("dense outlined options-dense")


def entry_field(state: State, name: str, title: str) -> None:
    """Let the reader write one value of the address; Enter takes it."""
    field = ui.input(title, value=state.values.get(name, "")).props("dense outlined clearable")
    field.on("keydown.enter", lambda: go(state.change(**{name: field.value, "page": None})))
    field.on("clear", lambda: go(state.change(**{name: None, "page": None})))


def entry(page: Page, row: dict[str, Any], images: bool) -> None:
    """Show one query as a link to it."""
    with box("li"), link(page.state.link("query", id=row["query"]), "entry"):
        if images:
            picture(page.state, page.query_set, row["query"], row.get("label"))
        passage(row.get("snippet") or "", set())
        with box("span", "about"):
            verdict(row)
            say(f"loss {number(row.get('loss'))}", "muted")
            say(f"query {row['query']}", "muted")
            if str(row["source_id"]) != str(row["query"]):
                say(f"source {row['source_id']}", "muted")


def turn_pages(state: State, at: int, total: int, each: int) -> None:
    """Show the page numbers, where there is more than one page."""
    pages = -(-total // each)
    if pages > 1:
        turn = ui.pagination(
            1, pages, value=at, direction_links=True, on_change=lambda e: go(state.change(page=e.value))
        )
        turn.props('max-pages=6 boundary-numbers aria-label="Pages"')
