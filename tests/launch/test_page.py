"""What the page computes by itself: addresses, shared words, what a cleansing would drop."""

import csv
import io
import json
from typing import Any

import numpy as np
import pytest
from starlette.exceptions import HTTPException

from launch.page import selection
from launch.page.ask import refusal
from launch.page.parts import number, text_of
from launch.page.selection import export, plain_cell, select
from launch.page.state import State, address
from launch.page.words import marked, telling_words
from launch.service.catalog import Page


def test_an_address_keeps_what_belongs_to_it() -> None:
    state = State("queries", {"run": "a b", "scores": "s", "k": "5", "page": "2", "text": "&x=1"})
    assert state.change(page=3) == "queries?run=a+b&scores=s&k=5&page=3&text=%26x%3D1"
    assert state.change(text=None, page="") == "queries?run=a+b&scores=s&k=5"
    assert state.link("query", id=0) == "query?run=a+b&scores=s&k=5&id=0"
    assert address("graph", {}) == "graph?"


@pytest.mark.parametrize(
    ("text", "expected"), [("7", 7), ("0", 1), ("99", 20), ("-3", 10), ("", 10), ("x", 10), ("٣", 3), ("9" * 30, 10)]
)
def test_a_whole_number_stays_in_its_range(text: str, expected: int) -> None:
    assert State("query", {"k": text}).whole("k", 10, 1, 20) == expected


def test_a_number_that_is_none_is_none() -> None:
    assert State("examples", {"threshold": "0.5"}).number("threshold") == 0.5
    assert State("examples", {"threshold": "much"}).number("threshold") is None
    assert State("examples", {"threshold": "nan"}).number("threshold") is None


def test_marked_words_are_those_of_both_texts() -> None:
    query, example = "The Film's plot was dull, DULL!", "a dull plot; not a film's end"
    shared = telling_words(query)
    assert shared == {"film's", "plot", "dull"}
    pieces = marked(example, shared)
    assert "".join(piece for piece, _ in pieces) == example
    assert [piece for piece, common in pieces if common] == ["dull", "plot", "film's"]
    assert marked("", shared) == []


def test_numbers_have_a_true_minus() -> None:
    shown = [number(0.1168, sign=True), number(-0.06544, sign=True), number(None), number(-1e-9)]
    assert shown == ["+0.1168", "−0.06544", "–", "−1e−09"]


def test_a_record_is_known_by_its_longest_text() -> None:
    assert text_of({"source_id": "a" * 99, "title": "x", "body": "longer", "label": "l" * 99}) == "longer"
    assert text_of({"source_id": "1", "image": {"image": "train/1"}}) == ""


class Table:
    """Thirty examples, one of them without numbers, as the catalog would give them."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).integers(0, 8, 30) / 8  # with ties
        self.rows: list[dict[str, Any]] = [
            {"id": i, "source_id": f"s{i}", "label": '1,"x"', "self_influence": v, "total": v - 0.5, "loss": 1 - v}
            for i, v in enumerate(values.tolist())
        ]
        self.rows[4] |= {"self_influence": None, "total": None, "loss": None}

    def examples(self, scores: str, *, order: str, offset: int, limit: int) -> Page:
        name, rising = order.removeprefix("-"), order.startswith("-")
        key = (lambda r: r["id"]) if name == "id" else (
            lambda r: (r[name] is None, 0 if r[name] is None else r[name] if rising else -r[name], r["id"])
        )  # fmt: skip
        return Page(sorted(self.rows, key=key)[offset : offset + limit], len(self.rows))


def dropped(table: Table, **address: str) -> list[int]:
    state = State("export", address)
    lines = "".join(export(table, "s", select(table, "s", state), "dropped", "jsonl"))  # type: ignore[arg-type]
    return [json.loads(line)["id"] for line in lines.splitlines()]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.125, 0.3, 0.875, 2.0])
def test_a_threshold_drops_what_lies_beyond_it(threshold: float) -> None:
    table = Table()
    known = [row for row in table.rows if row["loss"] is not None]
    above = [row["id"] for row in known if row["self_influence"] >= threshold]
    below = [row["id"] for row in known if row["total"] <= threshold]
    assert dropped(table, threshold=str(threshold)) == above
    assert dropped(table, threshold=str(threshold), order="-total") == below


@pytest.mark.parametrize("percent", ["0", "10", "33.4", "100", "1000", "-5"])
def test_a_share_drops_the_first_in_the_order(percent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "STEP", 7)
    table = Table()
    count = round(min(max(float(percent), 0), 100) / 100 * 30)
    ordered = [row["id"] for row in table.examples("s", order="self_influence", offset=0, limit=30).rows]
    assert dropped(table, percent=percent) == sorted(ordered[:count])


def test_kept_and_dropped_are_everything_once_in_both_forms() -> None:
    table = Table()
    chosen = select(table, "s", State("export", {"percent": "20"}))  # type: ignore[arg-type]
    found: dict[str, list[dict[str, str]]] = {}
    for which in ("kept", "dropped"):
        text = "".join(export(table, "s", chosen, which, "csv"))  # type: ignore[arg-type]
        found[which] = list(csv.DictReader(io.StringIO(text, newline="")))
        lines = "".join(export(table, "s", chosen, which, "jsonl")).splitlines()  # type: ignore[arg-type]
        assert [str(json.loads(line)["id"]) for line in lines] == [row["id"] for row in found[which]]
    assert (len(found["kept"]), len(found["dropped"])) == (24, 6)
    assert sorted(int(row["id"]) for rows in found.values() for row in rows) == list(range(30))
    assert all(row["label"] == '1,"x"' for row in found["kept"])


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("-2+3", "'-2+3"), ("+cmd", "'+cmd"), ("\t=1", "'\t=1"),
        ("-1", "-1"), ("+.5", "+.5"), ("a=1", "a=1"), ("", ""), (-1.5, -1.5), (None, None),
    ],
)  # fmt: skip
def test_no_cell_of_an_export_is_a_formula(value: object, cell: object) -> None:
    assert plain_cell(value) == cell


def test_a_question_that_is_not_answered_says_why() -> None:
    assert refusal(HTTPException(429, "4 questions are being computed: try later")).startswith("4 questions")
    assert refusal(ValueError("label 7 is not known")) == "label 7 is not known"
    assert "too long" in refusal(TimeoutError())
