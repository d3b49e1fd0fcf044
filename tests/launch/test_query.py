import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import query
from launch.query import answer, main
from launch.run import Run


def test_a_stored_query_by_row_and_by_source_id(scored: Run) -> None:
    by_row = answer(scored, "2", scores="first", top=3)
    assert by_row == answer(scored, "source:r1002", scores="first", top=3)
    assert by_row["query"]["id"] == 2
    assert (by_row["method"], by_row["score_unit"], by_row["scores"]) == ("tracin", "loss_change", "first")
    found = [row["score"] for row in by_row["proponents"]]
    assert found == sorted(found, reverse=True)
    assert len(found) == 3
    assert json.loads(json.dumps(by_row)) == by_row


def test_a_new_text(scored: Run) -> None:
    found = answer(scored, None, text="the film was dull", label="1", scores="first", top=2)
    assert (found["query"]["id"], found["query"]["label"]) == (None, "1")
    assert len(found["proponents"]) == len(found["opponents"]) == 2


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no question": ({"query": None}, "give either --query (a stored query) or --text (a new one)"),
    "two questions": ({"query": "1", "text": "a"}, "give either --query (a stored query) or --text (a new one)"),
    "none asked for": ({"query": "1", "top": 0}, "--top 0 is not allowed: 1 to 50, which output.top_k kept"),
    "more than are kept": ({"query": "1", "top": 51}, "--top 51 is not allowed: 1 to 50"),
    "no such row": ({"query": "5"}, "query '5' is not there: rows 0 to 4, or source:ID"),
    "negative": ({"query": "-1"}, "query '-1' is not there: rows 0 to 4, or source:ID"),
    "no number": ({"query": "first"}, "query 'first' is not there: rows 0 to 4, or source:ID"),
    "no such source": ({"query": "source:r9"}, "corpus 'asked' has no example with source id 'r9'."),
    "wrong label": ({"query": None, "text": "a film", "label": "7"}, "field 'label' is '7', allowed: 0 to 2."),
    "several scores": ({"query": "1", "scores": None}, "holds several scores: name one of first, second"),
    "wrong scores": ({"query": "1", "scores": "third"}, "scores 'third' are not in "),
    "long text": ({"query": None, "text": "film " * 99, "label": "0", "limit": 99}, "the model 16 positions"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_message(scored: Run, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    given, message = MISTAKES[kind]
    given = {"scores": "first", "top": 5} | given
    if given.pop("limit", None):  # a run whose texts were all short, made with a larger max_tokens
        task = scored.setting("first").context.task(scored.setting("first").model)
        monkeypatch.setattr(task, "max_tokens", 512)
        monkeypatch.setattr("actors.context.make_task", lambda *_: task)
    with pytest.raises(SystemExit) as ended:
        main(scored.location.uri, **given)
    shown = capsys.readouterr().err
    assert ended.value.code == 1
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_a_wrong_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(str(tmp_path / "nowhere"), query="0")
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/nowhere holds no scores: run launch/score.py, or check the path\n"
    )


def test_an_answer_for_a_person(scored: Run) -> None:
    out = io.StringIO()
    query.show(answer(scored, "0", scores="first", top=1), Console(file=out, width=120))
    for part in ("query 0", "source_id=r1000", "label=", "tracin, scores in units of loss_change", "proponents"):
        assert part in out.getvalue()


def test_from_the_command_line(scored: Run) -> None:
    command = [sys.executable, "launch/query.py", scored.location.uri, "--query", "0", "--scores", "second", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == answer(scored, "0", scores="second")
