"""The page in a real browser: what a reader does, and that it shows what the run says."""

import csv
import json
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, expect

from launch.page.parts import number
from launch.run import Run
from launch.service.catalog import RunView
from tests.e2e.browsing import NARROW, Visitor, settled, shoot
from tests.e2e.conftest import HOSTILE, TRAIN

SCORES = "run=texts&scores=scores"
VIEWS = {
    "queries": "queries", "query": "query?id=3", "example": "example?id=3", "examples": "examples", "graph": "graph",
    "ask": "ask", "progress": "progress",
}  # fmt: skip


def values(page: Page) -> dict[str, str]:
    """Return what the address bar says."""
    return {name: found[0] for name, found in parse_qs(urlsplit(page.url).query).items()}


def arrives(page: Page, pattern: str) -> None:
    page.wait_for_url(re.compile(pattern))
    settled(page)


def listed(page: Page, side: str) -> list[tuple[str, str]]:
    """Return what each row of a side is about and its score, as shown."""
    rows = page.get_by_role("region", name=side).locator(".hit").all()
    return [(row.locator(".about").inner_text(), row.locator(".score").inner_text()) for row in rows]


def test_a_mistake_leads_to_its_proponents_and_from_there_back(visitor: Visitor, texts: RunView) -> None:
    page = visitor.page()
    page.goto(visitor.url)
    arrives(page, "/page/queries")
    assert values(page) == {"run": "texts", "scores": "scores"}
    worst = texts.queries("scores").rows
    assert worst[0]["misclassified"]
    assert worst[0]["loss"] >= worst[1]["loss"]
    entries = page.locator(".entry")
    assert [e.locator(".text").inner_text() for e in entries.all()] == [row["snippet"] for row in worst]
    entries.first.click()
    arrives(page, "/page/query")
    query = worst[0]["query"]
    assert values(page)["id"] == str(query)
    table = Run.open(texts.uri).top(query, 10, "scores").to_pylist()
    for side in ("proponent", "opponent"):
        expected = [row for row in table if row["side"] == side]
        shown = listed(page, f"{side.capitalize()}s")
        assert len(shown) == len(expected) > 0
        for (about, score), row in zip(shown, expected, strict=True):
            assert f"example {row['id']}" in about
            assert score == number(row["score"], sign=True)
    first = table[0]["id"]
    page.get_by_role("region", name="Proponents").locator(".hit").first.click()
    arrives(page, "/page/example")
    assert values(page)["id"] == str(first)
    helped = {row["query"] for row in texts.example_influences("scores", first, 10) if row["side"] == "proponent"}
    assert query in helped
    shown = page.get_by_role("region", name="Proponents").locator(".hit")
    assert {int(re.search(r"query (\d+)", row.inner_text())[1]) for row in shown.all()} == helped
    shown.filter(has_text=f"query {query}").first.click()
    arrives(page, f"/page/query.*id={query}")


def test_shared_words_are_marked(visitor: Visitor, texts: RunView) -> None:
    page = visitor.go(f"query?{SCORES}&id=3")
    marks = {word.casefold() for word in page.locator(".hit mark").all_inner_texts()}
    assert marks <= {"dull", "film", "src", "img", "onerror", "stolen", "script"}
    assert marks & {"dull", "film"}


def test_a_new_text_is_answered_and_its_address_says_so(visitor: Visitor, texts: RunView) -> None:
    page = visitor.go(f"ask?{SCORES}&k=3")
    page.get_by_label("Text").fill("a dull plot")
    page.get_by_role("button", name="Ask").click()
    arrives(page, "text=a\\+dull\\+plot")
    expect(page.locator(".hit").first).to_be_visible(timeout=60_000)
    answer = Run.open(texts.uri).score(["a dull plot"], k=3, scores="scores")[0]
    for side, rows in (("Proponents", answer.proponents), ("Opponents", answer.opponents)):
        expected = [(row["id"], number(row["score"], sign=True)) for row in rows]
        assert [(int(re.search(r"example (\d+)", about)[1]), s) for about, s in listed(page, side)] == expected
    again = visitor.go(page.url.partition("/page/")[2])
    expect(again.locator(".hit").first).to_be_visible(timeout=60_000)
    assert listed(again, "Proponents") == listed(page, "Proponents")


def test_scores_that_are_not_online_or_a_task_without_text_say_so(visitor: Visitor) -> None:
    page = visitor.go("ask?run=pictures&text=hello")
    expect(page.locator(".notice.bad")).to_contain_text("reads no text", timeout=60_000)


def download(page: Page, name: str, to: Path) -> Path:
    with page.expect_download() as waited:
        page.get_by_role("link", name=name).click()
    path = to / name.replace(" ", ".")
    waited.value.save_as(path)
    return path


def test_a_cleansed_list_is_exported(visitor: Visitor, texts: RunView, tmp_path: Path) -> None:
    page = visitor.go(f"examples?{SCORES}")
    share = page.get_by_label("Drop the top %")
    share.fill("10")
    share.press("Enter")
    arrives(page, "percent=10")
    expect(page.locator(".verdict")).to_contain_text(f"Drops {TRAIN // 10} of {TRAIN} examples (10.0%), keeps 72")
    suspects = [row["id"] for row in texts.examples("scores", limit=TRAIN).rows]
    with download(page, "dropped as csv", tmp_path).open(newline="") as file:
        dropped = list(csv.DictReader(file))
    assert {int(row["id"]) for row in dropped} == set(suspects[: TRAIN // 10])
    lines = download(page, "kept as jsonl", tmp_path).read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [row["id"] for row in kept] == sorted(suspects[TRAIN // 10 :])
    assert all(row["source_id"] == f"r{row['id']}" for row in kept)
    edge = texts.examples("scores", offset=2, limit=1).rows[0]["self_influence"]
    threshold = page.get_by_label("or all at or above")
    threshold.fill(repr(edge))
    threshold.press("Enter")
    arrives(page, "threshold=")
    assert "percent" not in values(page)
    expect(page.locator(".verdict")).to_contain_text(f"Drops 3 of {TRAIN} examples")
    assert page.locator(".dropped").count() == 3


def test_a_copied_address_shows_the_same_list(visitor: Visitor, texts: RunView) -> None:
    page = visitor.go(f"queries?{SCORES}")
    page.get_by_label("Show").click()
    page.get_by_role("option", name="mispredicted", exact=True).click()
    arrives(page, "mispredicted=yes")
    field = page.get_by_label("Text contains")
    field.fill("dull")
    field.press("Enter")
    arrives(page, "text=dull")
    expected = [row["snippet"] for row in texts.queries("scores", misclassified=True, text="dull").rows]
    shown = page.locator(".entry .text").all_inner_texts()
    assert shown == expected
    assert shown
    assert visitor.go(page.url.partition("/page/")[2]).locator(".entry .text").all_inner_texts() == shown


def test_pages_of_a_list_and_the_back_button(visitor: Visitor, texts: RunView) -> None:
    page = visitor.go(f"queries?{SCORES}")
    page.get_by_role("button", name="2").click()
    arrives(page, "page=2")
    rest = [row["snippet"] for row in texts.queries("scores", offset=50).rows]
    assert page.locator(".entry .text").all_inner_texts() == rest
    page.go_back()
    arrives(page, "scores=scores$")
    assert page.locator(".entry").count() == 50


def test_other_scores_are_chosen(visitor: Visitor) -> None:
    page = visitor.go(f"query?{SCORES}&id=1")
    page.get_by_label("Scores").click()
    page.get_by_role("option", name="second").click()
    arrives(page, "scores=second")
    assert "/page/queries" in page.url


def test_the_graph_leads_to_its_nodes(visitor: Visitor, texts: RunView) -> None:
    page = visitor.go(f"graph?{SCORES}&queries=2,5&k=3")
    edges = texts.graph("scores", [2, 5], 3)["edges"]
    expect(page.locator(".edge")).to_have_count(len(edges))
    chart = page.locator(".graph svg")
    expect(chart.get_by_text("query 5", exact=True)).to_be_visible()
    box = chart.get_by_text("query 5", exact=True).bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] + 9, box["y"] + box["height"] / 2)
    arrives(page, "/page/query.*id=5")


def test_text_from_data_stays_text(visitor: Visitor) -> None:
    for address in ("query?id=3", "example?id=3", f"queries?{SCORES}&text=img", "graph?queries=3"):
        page = visitor.go(address if "run=" in address else f"{address}&{SCORES}")
        assert page.evaluate("typeof stolen") == "undefined"
        assert page.locator("main img").count() == 0
        if "graph" not in address:
            assert HOSTILE in page.locator("main .text").first.inner_text()


def test_images_are_shown(visitor: Visitor) -> None:
    for address, count in (("queries?run=pictures", 6), ("query?run=pictures&id=1", 2), ("examples?run=pictures", 25)):
        page = visitor.go(address)
        page.mouse.wheel(0, 10_000)
        images = page.locator("main img")
        assert images.count() >= count
        page.wait_for_function(
            "[...document.querySelectorAll('main img')].slice(0, 3).every(i => i.naturalWidth === 4)"
        )
        assert "image" in (images.first.get_attribute("alt") or "")
    shoot(page, "images")


def test_the_keyboard_alone_is_enough(visitor: Visitor) -> None:
    page = visitor.go(f"queries?{SCORES}")
    page.keyboard.press("Tab")
    assert focused(page)["text"] == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.classList.contains('main')")
    for _ in range(12):
        page.keyboard.press("Tab")
        if "entry" in focused(page)["class"]:
            break
    assert "entry" in focused(page)["class"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    arrives(page, "/page/query\\?")


def focused(page: Page) -> dict[str, str]:
    return page.evaluate("({text: document.activeElement.innerText, class: document.activeElement.className})")


@pytest.mark.parametrize("width", [1400, NARROW])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_fits_and_names_its_controls(visitor: Visitor, view: str, width: int) -> None:
    page = visitor.go(VIEWS[view] + ("&" if "?" in VIEWS[view] else "?") + SCORES, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select, button, a')].filter(e => e.offsetParent && "
        "!(e.getAttribute('aria-label') || e.innerText || (e.labels && e.labels.length))).map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert page.locator("h2").first.is_visible()
    shoot(page, f"{view}-{width}")


def test_dark_is_dark(visitor: Visitor) -> None:
    page = visitor.go(f"examples?{SCORES}", scheme="dark")
    red, green, blue = (
        int(part) for part in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).color"))
    )
    assert min(red, green, blue) > 200
    shoot(page, "examples-dark")


@pytest.mark.parametrize("address", ["query?id=999", "example?id=999", f"query?{SCORES}&id=1&field=nope&value=1"])
def test_what_is_not_there_is_said(visitor: Visitor, address: str) -> None:
    page = visitor.page()
    page.goto(f"{visitor.url}/page/{address}")
    expect(page.locator(".notice.bad")).to_be_visible()
    visitor.wrong[:] = [text for text in visitor.wrong if "404" not in text]
