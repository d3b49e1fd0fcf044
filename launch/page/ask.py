"""A text that the run has never seen: what the model says of it, and the training examples behind that."""

from typing import Any

from nicegui import ui
from starlette.exceptions import HTTPException

from launch.page.frame import Page, scored
from launch.page.parts import Shown, box, card, choose_count, go, heading, notice, passage, say, sides, verdict
from launch.service.catalog import NotOnline, NotReady

LONGEST = 20_000  # characters


async def show(page: Page) -> None:
    """Show the field for a text and, if the address holds one, the answer to it."""
    heading("Ask", "about a text that the run has never seen")
    if not scored(page):
        return
    state, k = page.state, page.state.whole("k", 10, 1, int(page.known["top_k"]))
    if not page.known["online"]:
        notice(
            f"{page.known['method']} cannot answer a new text at once: put it into a query set and run launch/score.py."
        )
        return
    with card("ask"):
        field = ui.textarea("Text", value=state.values.get("text", "")).props(f"outlined autogrow maxlength={LONGEST}")
        field.classes("whole")
        with box("div", "filters"):
            label = ui.input("Label", value=state.values.get("label", ""), placeholder="the model's own")
            label.props("dense outlined stack-label")
            choose_count(state, k, int(page.known["top_k"]))
            ui.button(
                "Ask", on_click=lambda: go(state.change(text=(field.value or "").strip(), label=label.value))
            ).props("unelevated no-caps")
    text = state.get("text")
    if text:
        await answer(page, text[:LONGEST], state.get("label"), k)


async def answer(page: Page, text: str, label: str | None, k: int) -> None:
    """Compute and show the answer; the page is there before it."""
    with box("div", "answer", aria_live="polite") as place, box("p", "notice"):
        ui.spinner(size="1.5em").props("aria-hidden=true")
        say("Reading the model and every stored gradient …")
    await ui.context.client.connected()
    try:
        found = await page.service.compute(
            lambda: page.run.attribute(page.label, [text], [label] if label else None, k)[0]
        )
    except (ValueError, LookupError, NotOnline, NotReady, HTTPException, TimeoutError) as error:
        place.clear()
        with place:
            notice(refusal(error), "bad")
        return
    place.clear()
    with place:
        show_answer(page, text, found)


def refusal(error: Exception) -> str:
    """Return what to tell of a question that was not answered."""
    if isinstance(error, TimeoutError):
        return "The answer took too long: try again, or put the text into a query set and run launch/score.py."
    return str(getattr(error, "detail", error))


def show_answer(page: Page, text: str, found: dict[str, Any]) -> None:
    """Show what the model says of the text, and the examples behind it."""
    with card("subject"), box("div", "whole"):
        passage(text, set(), "text large")
        with box("div", "about"):
            verdict({"label": found.get("label"), "predicted": found.get("prediction")})
    rows = [row | {"side": side} for side in ("proponent", "opponent") for row in found[f"{side}s"]]
    sides(Shown(page.state, "example", None, text, page.known["score_unit"]), rows)
