"""How a run is doing: its state and its stages, followed live."""

import asyncio
from typing import Any

from nicegui import ui

from launch.page.frame import Page
from launch.page.parts import bar, box, card, heading, link, say
from launch.page.state import address

SAID = {
    "waiting": "The job has not begun.",
    "running": "The job is running.",
    "stalled": "The job stands still: nobody is working on it. Run the same command again and it goes on.",
    "finished": "The job is done.",
}


async def show(page: Page) -> None:
    """Show the stages of the chosen run, every second anew, and the other runs that are served."""
    heading("Progress", page.run.uri)
    stages = box("div", "stages")
    shown: list[Any] = []  # what the reader sees now

    async def look() -> None:
        progress, scores = await asyncio.to_thread(lambda: (page.run.progress(), page.run.scores()))
        now = [progress["state"], progress["stages"], scores]
        if now == shown:
            return
        shown[:] = now
        stages.clear()
        with stages:
            state(progress)
            for stage in progress["stages"]:
                one_stage(stage)
            if scores:
                heading("Scores")
                with box("ul", "list"):
                    for meta in scores:
                        one_label(page, meta)

    await look()
    ui.timer(1.0, look, immediate=False)
    if len(page.names) > 1:
        heading("All runs")
        with box("ul", "list"):
            for name in page.names:
                with box("li"), link(address("progress", {"run": name}), "entry"):
                    say(name, "text")


def state(progress: dict[str, Any]) -> None:
    """Show the state of the run in a word and a sentence."""
    with box("p", "state", role="status"):
        say(progress["state"], f"tag {progress['state']}")
        say(SAID[progress["state"]])
        if progress.get("updated"):
            say(f"as of {progress['updated'][11:19]} UTC", "muted")


def one_stage(stage: dict[str, Any]) -> None:
    """Show one stage as a bar."""
    share = stage["done"] / stage["units"] if stage["units"] else 0.0
    with card("stage"):
        say(stage["stage"], "name")
        bar(share, "done")
        say(f"{stage['done']} of {stage['units']} units", "muted")


def one_label(page: Page, meta: dict[str, Any]) -> None:
    """Show which scores there are, and the way to them."""
    with box("li"), link(address("queries", {"run": page.run.name, "scores": meta["label"]}), "entry"):
        say(meta["label"], "text")
        with box("span", "about"):
            say(f"{meta['method']}, {meta['queries']} queries, {meta['examples']} examples", "muted")
            say("complete" if meta["complete"] else f"{meta['covered']:.0%} of the examples seen", "tag")
