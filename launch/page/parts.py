"""The pieces that views are made of. Everything that comes from data goes in as text, never as HTML."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from launch.page.state import State, address
from launch.page.words import marked, telling_words

SIDES = {
    "proponent": ("Proponents", "training on them lowered the loss"),
    "opponent": ("Opponents", "training on them raised it"),
}
OF_LOGITS = {
    "proponent": ("Proponents", "they raise the logit of the query's class"),
    "opponent": ("Opponents", "they lower it"),
}


def box(tag: str, classes: str = "", **props: object) -> ui.element:
    """Return an element with classes and attributes; `aria_label` is written aria-label."""
    element = ui.element(tag).classes(classes)
    for name, value in props.items():
        element.props[name.replace("_", "-")] = value
    return element


def say(text: object, classes: str = "", tag: str = "span") -> TextElement:
    """Return an element that holds this text."""
    return TextElement(tag=tag, text=str(text)).classes(classes)


def link(href: str, classes: str = "", **props: object) -> ui.element:
    """Return a real link: the browser's own keys, menus and history work on it."""
    return box("a", classes, href=href, **props)


def heading(text: str, note: str = "") -> None:
    """Show a section's title with a word of explanation."""
    with box("div", "heading"):
        say(text, tag="h2")
        if note:
            say(note, "muted")


def tag(text: object, kind: str = "") -> None:
    """Show a small tag: a label, a state."""
    say(text, f"tag {kind}")


def verdict(row: Mapping[str, Any]) -> None:
    """Show a query's label and what the model said instead, where it made a prediction."""
    label, predicted = row.get("label"), row.get("predicted")
    if label is not None:
        tag(f"label {label}")
    if predicted is not None:
        wrong = bool(row.get("misclassified"))
        tag(f"{'✕ ' if wrong else '✓ '}predicted {predicted}", "wrong" if wrong else "right")


def text_of(record: Mapping[str, Any]) -> str:
    """Return the text by which a person knows a record: the longest of the fields that hold text."""
    named = record.get("text") or record.get("snippet")
    if isinstance(named, str):
        return named
    texts = [v for k, v in record.items() if isinstance(v, str) and k not in ("source_id", "label", "predicted")]
    return max(texts, key=len, default="")


def passage(text: str, shared: set[str], classes: str = "text") -> None:
    """Show a text with the shared words marked."""
    with box("span", classes, dir="auto"):
        for piece, common in marked(text, shared):
            say(piece, tag="mark" if common else "span")


def picture(state: State, which: str, row: int, label: object, classes: str = "picture") -> None:
    """Show the image of a row of the set `which`."""
    values = {name: state.values.get(name) for name in ("run", "scores")} | {"set": which, "id": row}
    about = f"image {row} of {which}" + (f", label {label}" if label is not None else "")
    box("img", classes, src=address("image", values), alt=about, loading="lazy")


def holds_image(record: Mapping[str, Any]) -> bool:
    """Tell whether a record, as the catalog gives it, has a field that is an image."""
    return any(isinstance(value, dict) and "image" in value for value in record.values())


def bar(share: float, side: str) -> None:
    """Show a score's size as a bar, 1 being the strongest shown; the number beside it says it in words."""
    bar = ui.linear_progress(value=max(0.0, min(1.0, share)), show_value=False, size="6px", color=None)
    bar.classes(f"bar {side}").props("aria-hidden=true instant-feedback rounded")


def number(value: float | None, sign: bool = False) -> str:
    """Return a number to four figures, a dash for none."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.4g}".replace("-", "−")


@dataclass(frozen=True)
class Shown:
    """How the rows of an answer are shown: which view a row opens, whose images it has, which words are marked."""

    state: State
    view: str  # query or example
    images: str | None  # the set that the images belong to; None for rows without
    own: str  # the text whose words are marked
    unit: str  # of the scores


def sides(shown: Shown, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show two columns of rows with side, score, label and snippet: what helps at the left, what hurts at the right."""
    strongest = max((abs(row["score"]) for row in rows), default=0.0) or 1.0
    with box("div", "sides"):
        for side, (title, note) in (OF_LOGITS if shown.unit == "logit" else SIDES).items():
            here = [row for row in rows if row["side"] == side]
            with box("section", "side", aria_label=title):
                heading(title, note)
                with box("ol", "hits"):
                    for place, row in enumerate(here, 1):
                        hit(shown, row, abs(row["score"]) / strongest, place)
                if not here:
                    say("None: no stored score has this sign.", "muted")


def hit(shown: Shown, row: Mapping[str, Any], share: float, place: int) -> None:
    """Show one row of an answer, as a link to it."""
    target = row["query"] if shown.view == "query" else row["id"]
    with box("li"), link(shown.state.link(shown.view, id=target), "hit"):
        with box("span", "measure"):
            say(place, "place")
            bar(share, row["side"])
            say(number(row["score"], sign=True), f"score {row['side']}")
        with box("span", "about"):
            if row.get("label") is not None:
                tag(f"label {row['label']}")
            say(f"{shown.view} {target}", "muted")
            if str(row.get("source_id")) != str(target):
                say(f"source {row['source_id']}", "muted")
        if shown.images:
            picture(shown.state, shown.images, target, row.get("label"))
        passage(row.get("snippet") or "", telling_words(shown.own))


def fields(record: Mapping[str, Any], leave_out: Sequence[str]) -> None:
    """Show the rest of a record, field by field, folded away."""
    rest = {k: v for k, v in record.items() if k not in leave_out and v is not None and not isinstance(v, dict | list)}
    if rest:
        with box("details", "fields"):
            say("All fields", tag="summary")
            with box("dl"):
                for name, value in rest.items():
                    say(name, tag="dt")
                    say(value, tag="dd")


def notice(text: str, kind: str = "") -> ui.element:
    """Show a message that is read out when it appears."""
    return say(text, f"notice {kind}", "p").props("role=status")


def go(href: str) -> None:
    """Open an address of the page, in the same tab."""
    ui.navigate.to(href)


def choose_count(state: State, k: int, most: int) -> None:
    """Let the reader choose how many rows to see on each side."""
    options = sorted({n for n in (3, 5, 10, 20, 50, 100, k, most) if n <= most})
    select = ui.select(options, value=k, label="Rows on each side", on_change=lambda e: go(state.change(k=e.value)))
    select.props("dense outlined options-dense").classes("short")


def card(classes: str = "") -> AbstractContextManager[Any]:
    """Return a surface to put things on."""
    return box("div", f"card {classes}")
