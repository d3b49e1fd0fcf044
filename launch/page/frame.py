"""What stands around every view: choosing a run and scores, the way to the other views, and how the run is doing."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicegui import ui

from launch.page.parts import box, go, holds_image, link, notice, say
from launch.page.state import State, address
from launch.service.catalog import RunView
from launch.service.work import Service

VIEWS = {
    "queries": "Queries",
    "examples": "Training data",
    "graph": "Graph",
    "ask": "Ask",
    "progress": "Progress",
}
PARENTS = {"query": "queries", "example": "examples"}
STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class Page:
    """What a view is given: the address, the run and the scores that it names."""

    service: Service
    state: State
    run: RunView
    scores: list[dict[str, Any]]  # all of the run
    meta: dict[str, Any] | None  # those chosen; None while the run has none

    @property
    def names(self) -> list[str]:
        """Return the names of all runs."""
        return self.service.catalog.names

    @property
    def label(self) -> str:
        """Return the label of the scores that are looked at."""
        return str(self.known["label"])

    @property
    def known(self) -> dict[str, Any]:
        """Return what the scores say of themselves. Only for views that checked that there are any."""
        assert self.meta is not None
        return self.meta

    @property
    def query_set(self) -> str:
        return str(self.known["query_set"])

    @property
    def corpus(self) -> str:
        return str(self.known["corpus"])

    def has_images(self, which: str, row: int) -> bool:
        """Return whether the records of a set are images, as one of its rows shows."""
        return holds_image(self.run.record(which, row, self.label))


@contextmanager
def framed(page: Page) -> Iterator[None]:
    """Show what stands around a view; its own content goes into the block."""
    ui.add_css(STYLE)
    ui.colors(primary="#2c5f8a")
    main = box("div", "main")
    with ui.header(fixed=False).classes("top"):
        with link(address("progress", {"run": page.run.name}), "brand", aria_label="Influence: progress of this run"):
            say("Influence")
        choosers(page)
        here = PARENTS.get(page.state.view, page.state.view)
        with box("nav", "views", aria_label="Views"):
            for view, title in VIEWS.items():
                current = {"aria_current": "page"} if view == here else {}
                with link(page.state.link(view), **current):
                    say(title)
    ui.skip_link("Skip to the content", target=main)
    with main:
        if page.state.view != "progress":
            growth(page)
        yield


def choosers(page: Page) -> None:
    """Let the reader choose the run and the scores."""
    with box("div", "choosers"):
        run = ui.select(
            page.names,
            value=page.run.name,
            label="Run",
            on_change=lambda e: go(address(start(page), {"run": e.value})),
        )
        run.props("dense outlined options-dense")
        if page.meta is not None:
            labels = {s["label"]: s["label"] for s in page.scores}
            scores = ui.select(
                labels,
                value=page.label,
                label="Scores",
                on_change=lambda e: go(address(start(page), {"run": page.run.name, "scores": e.value})),
            )
            scores.props("dense outlined options-dense").classes("wide")


def start(page: Page) -> str:
    """Return the view to stay in when run or scores change: a single query or example may not be there."""
    return PARENTS.get(page.state.view, page.state.view)


def growth(page: Page) -> None:
    """While scores are unfinished, say how far they have come, and offer the newer answer when there is one."""
    seen = page.meta["covered"] if page.meta is not None else 0.0
    if page.meta is not None and page.meta["complete"]:
        return
    with box("div", "growth", role="status", aria_live="polite"):
        state = say("", "tag")
        words = say("")
        newer = link(page.state.change()).classes("button")
        with newer:
            say("Show the newer answer")
        newer.set_visibility(False)

    async def look() -> None:
        progress, scores = await asyncio.to_thread(lambda: (page.run.progress(), page.run.scores()))
        meta = next((s for s in scores if page.meta is None or s["label"] == page.label), None)
        state.text = progress["state"]
        state.classes(replace=f"tag {progress['state']}")
        covered = meta["covered"] if meta else 0.0
        words.text = (
            f"These scores have seen {covered:.0%} of the training examples so far." if meta else waiting(progress)
        )
        newer.set_visibility(meta is not None and (covered > seen or bool(meta["complete"]) or page.meta is None))

    ui.timer(2.0, look)


def waiting(progress: dict[str, Any]) -> str:
    """Return why there is nothing to see yet."""
    said = {
        "waiting": "The job has not begun.",
        "running": "The job is running; no scores yet.",
        "stalled": "The job stands still and has left no scores. Run it again: it goes on where it stopped.",
        "finished": "The job has ended without scores.",
    }
    return said[progress["state"]]


def scored(page: Page) -> bool:
    """Tell whether there are scores to show; if not, say what to do."""
    if page.meta is None:
        notice("There are no scores to show yet. They appear here as soon as the job has made the first.")
    return page.meta is not None
