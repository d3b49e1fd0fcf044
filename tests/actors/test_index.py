from typing import Any

import pytest

from actors.index import SNIPPET, Fields, brief


@pytest.mark.parametrize(
    ("record", "fields", "expected"),
    [
        ({"source_id": 7, "text": "a film", "label": 1}, Fields(), ("7", "1", "a film")),
        ({"source_id": "r1", "mood": "good", "body": "a plot"}, Fields("body", "mood"), ("r1", "good", "a plot")),
        ({"source_id": "r1", "target": 0.5, "x": [1.0]}, Fields(label="target"), ("r1", "0.5", "")),
        ({"source_id": "r1", "text": None, "label": [1, 2]}, Fields(), ("r1", None, "")),
    ],
)
def test_a_brief_shows_id_label_and_text(record: dict[str, Any], fields: Fields, expected: tuple[str, ...]) -> None:
    assert tuple(brief(record, fields).values()) == expected


def test_a_long_text_is_cut() -> None:
    snippet = brief({"source_id": "r", "text": "x" * 1000}, Fields())["snippet"]
    assert (len(snippet), snippet[-2:]) == (SNIPPET, "x…")
