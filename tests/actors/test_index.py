from typing import Any

import pytest

from actors.index import SNIPPET, brief


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"source_id": 7, "text": "a film", "label": 1}, ("7", "1", "a film")),
        ({"source_id": "r1", "label": "good", "body": "a plot"}, ("r1", "good", "a plot")),
        ({"source_id": "r1", "target": 0.5, "x": [1.0]}, ("r1", "0.5", "")),
        ({"source_id": "r1", "text": None, "labels": 0}, ("r1", "0", "")),
    ],
)
def test_a_brief_shows_id_label_and_the_first_text(record: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert tuple(brief(record).values()) == expected


def test_a_long_text_is_cut() -> None:
    snippet = brief({"source_id": "r", "text": "x" * 1000})["snippet"]
    assert (len(snippet), snippet[-2:]) == (SNIPPET, "x…")
