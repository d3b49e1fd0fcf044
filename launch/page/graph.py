"""The bipartite graph of influence: queries at the left, the examples that moved them at the right."""

import asyncio
from typing import Any

from nicegui import ui
from nicegui.events import EChartPointClickEventArguments

from launch.page.frame import Page, scored
from launch.page.parts import box, card, choose_count, go, heading, link, notice, number, say, tag
from launch.page.state import State

QUERIES, MOST_QUERIES, MOST_K = 8, 40, 10
COLORS = {"proponent": "var(--proponent)", "opponent": "var(--opponent)"}


async def show(page: Page) -> None:
    """Show the graph of the queries in the address (default: the most mispredicted), and the same as a list."""
    heading("Influence graph", "examples that pull several queries stand out; press a node to open it")
    if not scored(page):
        return
    state = page.state
    k = state.whole("k", 3, 1, MOST_K)
    queries = chosen(state)
    if not queries:
        worst = await asyncio.to_thread(page.run.queries, page.label, limit=QUERIES)
        queries = [row["query"] for row in worst.rows]
    with box("div", "filters"):
        choose_queries(state, queries)
        choose_count(state, k, min(MOST_K, int(page.known["top_k"])))
    found = await asyncio.to_thread(page.run.graph, page.label, queries, k)
    if not found["edges"]:
        notice("These queries have no scores yet.")
        return
    with card():
        draw(state, found)
    as_list(state, found)


def chosen(state: State) -> list[int]:
    """Return the queries that the address names, in its order, at most MOST_QUERIES."""
    named = [part.strip() for part in state.values.get("queries", "").split(",")]
    return list(dict.fromkeys(int(part) for part in named if part.isdecimal() and len(part) < 19))[:MOST_QUERIES]


def choose_queries(state: State, queries: list[int]) -> None:
    """Let the reader write which queries to see."""
    field = ui.input("Queries", value=", ".join(map(str, queries))).props("dense outlined").classes("wide")
    field.on("keydown.enter", lambda: go(state.change(queries=(field.value or "").replace(" ", ""))))


def draw(state: State, found: dict[str, Any]) -> None:
    """Draw both columns of nodes and the edges; an edge's width is its score's size, its colour the sign."""
    queries, examples, edges = found["queries"], found["examples"], found["edges"]
    nodes = [node(f"query {row['query']}", "left") for row in queries]
    nodes += [node(f"example {row['id']}", "right") for row in examples]
    links = [
        {
            "source": f"query {edge['query']}", "target": f"example {edge['id']}", "value": abs(edge["score"]),
            "lineStyle": {"color": COLORS[edge["side"]]},
        }
        for edge in edges
    ]  # fmt: skip

    def open_node(event: EChartPointClickEventArguments) -> None:
        if event.data_type == "node":
            view, _, row = event.name.partition(" ")
            go(state.link(view, id=row))

    series = {
        "type": "sankey", "data": nodes, "links": links, "left": 84, "right": 104, "top": 8, "bottom": 8,
        "nodeWidth": 8, "nodeGap": 13, "draggable": False, "lineStyle": {"opacity": 0.35},
        "emphasis": {"focus": "adjacency", "lineStyle": {"opacity": 0.7}},
    }  # fmt: skip
    chart = ui.echart({"animation": False, "series": [series]}, on_point_click=open_node, renderer="svg")
    told = f"{len(queries)} queries, {len(examples)} examples, {len(edges)} edges; listed below"
    height = max(300, 28 * max(len(queries), len(examples)))
    chart.classes("graph").style(f"height: {height}px").props(f'role=img aria-label="{told}"')


def node(name: str, side: str) -> dict[str, Any]:
    """Return one node: queries in the left column, examples in the right."""
    label = {"position": side, "color": "var(--ink)", "fontSize": 12, "textBorderWidth": 0}
    color = {"color": "var(--ink)" if side == "left" else "var(--accent)"}
    return {"name": name, "label": label, "itemStyle": color, "emphasis": {"itemStyle": color}}


def as_list(state: State, found: dict[str, Any]) -> None:
    """Show the same as text, for the keyboard and for narrow screens: every query with its edges."""
    heading("The same as a list")
    with box("ul", "list"):
        for row in found["queries"]:
            with box("li", "edges"):
                with link(state.link("query", id=row["query"])):
                    say(f"query {row['query']}", "name")
                for edge in (e for e in found["edges"] if e["query"] == row["query"]):
                    with link(state.link("example", id=edge["id"]), f"edge {edge['side']}"):
                        say(f"{edge['id']}")
                        say(number(edge["score"], sign=True), f"score {edge['side']}")
    shared = [row for row in found["examples"] if sum(e["id"] == row["id"] for e in found["edges"]) > 1]
    if shared:
        say(f"{len(shared)} examples move more than one of these queries:", "muted", "p")
        with box("p", "edges"):
            for row in shared:
                with link(state.link("example", id=row["id"])):
                    tag(f"example {row['id']}")
