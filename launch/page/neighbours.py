"""One query with the examples that moved it, and one example with the queries that it moved."""

import asyncio
from typing import Any

from nicegui import ui

from launch.page.frame import Page, scored
from launch.page.parts import (
    Shown,
    box,
    card,
    choose_count,
    fields,
    go,
    heading,
    holds_image,
    link,
    number,
    passage,
    picture,
    say,
    sides,
    text_of,
    verdict,
)
from launch.page.state import State

MOST = 100  # queries on each side of an example
TOLD = ("query", "id", "source_id", "label", "predicted", "misclassified", "loss", "self_influence", "total", "snippet")


async def show_query(page: Page) -> None:
    """Show a query's proponents and opponents."""
    if not scored(page):
        return
    state, most = page.state, int(page.known["top_k"])
    query, k = state.whole("id", 0, 0, 2**62), state.whole("k", 10, 1, most)
    where = {state.values["field"]: state.values["value"]} if state.get("field") and state.get("value") else None
    record, rows, names = await asyncio.to_thread(
        lambda: (
            page.run.query(page.label, query),
            page.run.influences(page.label, query, k, where=where),
            page.run.fields(page.label),
        )
    )
    heading(f"Query {query}", f"{page.known['method']}, scores in units of {page.known['score_unit']}")
    subject(page, record, page.query_set, query)
    with box("div", "filters"):
        choose_count(state, k, most)
        narrow(state, names)
    images = page.corpus if holds_image(record) else None
    sides(Shown(state, "example", images, text_of(record), page.known["score_unit"]), rows)
    with box("nav", "turn", aria_label="Neighbouring queries"):
        for step, title in ((-1, "← previous query"), (1, "next query →")):
            with box("span"):
                if 0 <= query + step < page.known["queries"]:
                    with link(state.change(id=query + step)):
                        say(title)


async def show_example(page: Page) -> None:
    """Show which queries a training example helped, and which it hurt."""
    if not scored(page):
        return
    state = page.state
    example, k = state.whole("id", 0, 0, 2**62), state.whole("k", 10, 1, MOST)
    record, rows = await asyncio.to_thread(
        lambda: (page.run.example(page.label, example), page.run.example_influences(page.label, example, k))
    )
    heading(f"Training example {example}", "the queries in whose strongest it stands")
    subject(page, record, page.corpus, example)
    with box("div", "filters"):
        choose_count(state, k, MOST)
    images = page.query_set if holds_image(record) else None
    sides(Shown(state, "query", images, text_of(record), page.known["score_unit"]), rows)


def subject(page: Page, record: dict[str, Any], which: str, row: int) -> None:
    """Show the record that the view is about, in full."""
    with card("subject"):
        if holds_image(record):
            picture(page.state, which, row, record.get("label"), "picture large")
        with box("div", "whole"):
            passage(text_of(record), set(), "text large")
            with box("div", "about"):
                verdict(record)
                for name in ("loss", "self_influence", "total"):
                    if record.get(name) is not None:
                        say(f"{name.replace('_', '-')} {number(record[name])}", "muted")
                say(f"source {record.get('source_id')}", "muted")
            fields(record, TOLD)


def narrow(state: State, names: list[str]) -> None:
    """Let the reader look only at training examples with one value in a field; Enter takes it."""
    name = state.values.get("field")
    field = ui.select(names, value=name if name in names else None, label="Only examples whose")
    field.props("dense outlined options-dense")
    value = ui.input("is", value=state.values.get("value", "")).props("dense outlined").classes("short")
    value.on("keydown.enter", lambda: go(state.change(field=field.value, value=value.value)))
    if state.get("field"):
        with link(state.change(field=None, value=None)):
            say("all examples")
