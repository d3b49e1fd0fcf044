"""Suspected label errors: the histogram of self-influence, what a threshold would drop, and the list that is left."""

import asyncio
import itertools
from typing import Any

from nicegui import ui

from launch.page.frame import Page, scored
from launch.page.parts import box, card, go, heading, link, notice, number, passage, picture, say, tag
from launch.page.queries import choice, turn_pages
from launch.page.selection import ORDERS, Selection, select
from launch.page.state import State, address

ON_A_PAGE = 25
INK, LINE, ACCENT, WARN = "var(--muted)", "var(--line)", "var(--accent)", "var(--opponent)"


async def show(page: Page) -> None:
    """Show the histogram, the selection and the examples in the order of suspicion."""
    heading("Suspected label errors", "an example that mostly explains itself is often labelled wrongly")
    if not scored(page):
        return
    state = page.state
    at = state.whole("page", 1, 1, 10**9)
    first = (at - 1) * ON_A_PAGE
    chosen = await asyncio.to_thread(select, page.run, page.label, state)
    found, histogram, edge = await asyncio.to_thread(
        lambda: (
            page.run.examples(page.label, order=chosen.order, offset=first, limit=ON_A_PAGE),
            page.run.histogram(page.label, column=chosen.column),
            last_dropped(page, chosen),
        )
    )
    with box("div", "filters"):
        choice(
            state,
            "order",
            "Order",
            {"": ORDERS["self_influence"]} | {k: v for k, v in ORDERS.items() if k != "self_influence"},
        )
    with card():
        bars(histogram, chosen, edge)
    cleanse(state, chosen, edge)
    if not found.total:
        notice("No example has been scored yet.")
        return
    images = bool(found.rows) and await asyncio.to_thread(page.has_images, page.corpus, found.rows[0]["id"])
    say(f"{first + 1}–{first + len(found.rows)} of {found.total}", "muted", "p")
    with box("ol", "list", start=first + 1):
        for place, row in enumerate(found.rows, first):
            suspect(page, row, place < chosen.count, images)
    turn_pages(state, at, found.total, ON_A_PAGE)


def last_dropped(page: Page, chosen: Selection) -> float | None:
    """Return the number at which the selection ends, None if it drops nothing."""
    if not chosen.count:
        return None
    row = page.run.examples(page.label, order=chosen.order, offset=chosen.count - 1, limit=1).rows[0]
    return row[chosen.column]


def cleanse(state: State, chosen: Selection, edge: float | None) -> None:
    """Let the reader choose how much to drop, say what that means, and give out the list."""
    with card("cleanse"):
        with box("div", "filters", role="group", aria_label="What to drop"):
            amount(state, "percent", "Drop the top %", 100 * chosen.count / max(1, chosen.examples), "threshold")
            title = "… or all at or below" if chosen.order.startswith("-") else "… or all at or above"
            amount(state, "threshold", title, edge, "percent")
        share = chosen.count / max(1, chosen.examples)
        with box("p", "verdict", role="status"):
            say(f"Drops {chosen.count:,} of {chosen.examples:,} examples ({share:.1%}), keeps", tag="strong")
            say(f" {chosen.examples - chosen.count:,}", tag="strong")
        for which in ("kept", "dropped"):
            with box("div", "exports"):
                say(f"List of the {which}", "muted")
                for form in ("csv", "jsonl"):
                    values = {**state.values, "which": which, "form": form, "page": None}
                    with link(address("export", values), "button", download="", aria_label=f"{which} as {form}"):
                        say(form.upper())


def amount(state: State, name: str, title: str, value: float | None, instead_of: str) -> None:
    """Let the reader write a number; Enter or leaving the field takes it."""
    shown = None if value is None else float(f"{value:.4g}")
    field = ui.number(title, value=shown, format="%.6g").props("dense outlined step=any").classes("short")

    def take() -> None:
        if field.value is not None and field.value != shown:
            go(state.change(**{name: field.value, instead_of: None, "page": None}))

    field.on("keydown.enter", take)
    field.on("blur", take)


def suspect(page: Page, row: dict[str, Any], dropped: bool, images: bool) -> None:
    """Show one example, and whether it would be dropped."""
    with box("li", "dropped" if dropped else ""), link(page.state.link("example", id=row["id"]), "entry"):
        if images:
            picture(page.state, page.corpus, row["id"], row.get("label"))
        passage(row.get("snippet") or "", set())
        with box("span", "about"):
            if dropped:
                tag("would be dropped", "wrong")
            if row.get("label") is not None:
                tag(f"label {row['label']}")
            for name in ("self_influence", "total", "loss"):
                say(f"{name.replace('_', '-')} {number(row.get(name))}", "muted")
            say(f"example {row['id']}", "muted")


def bars(histogram: dict[str, Any], chosen: Selection, edge: float | None) -> None:
    """Show a histogram; a line marks where the selection ends."""
    edges, counts = histogram["edges"], histogram["counts"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    title = chosen.column.replace("_", "-")
    data = [
        {
            "value": [x, count or None],
            "itemStyle": {"color": ACCENT if edge is None or not chosen.beyond(x, edge) else WARN},
        }
        for x, count in zip(middles, counts, strict=True)
    ]
    line = [] if edge is None else [{"xAxis": edge, "label": {"formatter": "dropped from here", "color": INK}}]
    chart = ui.echart(
        {
            "animation": False,
            "grid": {"left": 8, "right": 16, "top": 28, "bottom": 28, "containLabel": True},
            "xAxis": axis(title, nameLocation="middle", nameGap=26, scale=True),
            "yAxis": axis("examples", type="log", min=0.5, startValue=0.5, axisLabel={"color": INK, "showMinLabel": False}),
            "tooltip": {"trigger": "item", "renderMode": "richText"},
            "series": [
                {
                    "type": "bar", "data": data, "barWidth": "94%",
                    "markLine": {"silent": True, "precision": 12, "symbol": "none", "lineStyle": {"color": WARN}, "data": line},
                }
            ],
        },
        renderer="svg",
    )  # fmt: skip
    told = f"Histogram of {title} over {sum(counts)} examples, from {number(edges[0])} to {number(edges[-1])}"
    chart.classes("chart").props(f'role=img aria-label="{told}"')


def axis(name: str, **more: object) -> dict[str, Any]:
    """Return a quiet axis of numbers."""
    quiet = {"lineStyle": {"color": LINE}}
    return {
        "type": "value", "name": name, "nameTextStyle": {"color": INK}, "axisLabel": {"color": INK},
        "axisLine": quiet, "splitLine": quiet, **more,
    }  # fmt: skip
