import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from launch import query
from launch.query import answer, main
from launch.run import Run
from tests.end_to_end.conftest import run_job


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
    assert (found["query"]["id"], found["query"]["label"]) == (None, 1)  # as the stored queries have it
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


def test_stored_answers_import_no_torch(scored: Run) -> None:
    code = (
        "import sys\nfrom launch import query\n"
        f"query.main({scored.location.uri!r}, query='0', scores='first', as_json=True)\n"
        "assert not {'torch', 'transformers', 'ray', 'scipy'} & sys.modules.keys(), 'slow imports'\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["search"] == "exact"


def test_a_label_is_written_as_the_stored_ones_are(scored: Run) -> None:
    stored = answer(scored, "1", scores="first")["query"]["label"]
    asked = answer(scored, "1", label=str(stored), scores="first")["query"]["label"]
    predicted = answer(scored, "1", label="predicted", scores="first")["query"]["label"]
    assert (type(stored), type(asked), type(predicted)) == (int, int, int)
    assert asked == stored


def two_numbers() -> nn.Module:
    """Return the model of a task without texts."""
    return nn.Linear(2, 1)


def test_examples_without_text_show_their_fields(tmp_path: Path) -> None:
    for name, count in (("train", 12), ("asked", 2)):
        rows = [{"x": [i / 7, 1.0], "target": i / 3, "place": f"town {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model").mkdir()
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "model/model.pt")
    run = run_job({
        "run": str(tmp_path / "run"), "task": {"name": "regression", "settings": {"factory": f"{__name__}:two_numbers"}},
        "checkpoints": [{"path": str(tmp_path / "model"), "learning_rate": 0.1}],
        "corpus": str(tmp_path / "train.jsonl"), "queries": str(tmp_path / "asked.jsonl"),
        "gradients": {"coverage": 0, "modules": ["*"]}, "cluster": {"backend": "in-process"}, "output": {"top_k": 5},
    })  # fmt: skip
    found = answer(run, "1", top=2)
    row = found["proponents"][0]
    assert row["fields"] == {"x": [row["id"] / 7, 1.0], "place": f"town {row['id']}"}
    assert found["query"]["x"] == [1 / 7, 1.0]
    out = io.StringIO()
    query.show(found, Console(file=out, width=120))
    assert f"x=[{row['id'] / 7:.4g}, 1], place=town {row['id']}" in out.getvalue()
    assert out.getvalue().splitlines()[1].strip() == "x=[0.1429, 1], place=town 1"  # the query's own
    with pytest.raises(ValueError, match="near-identical examples are found by their text: these have no text"):
        answer(run, "1", collapse=True)
    with pytest.raises(ValueError, match="task regression has no token scores"):
        answer(run, "1", tokens=True)


def test_strong_tokens_are_marked_by_sign() -> None:
    tokens = [{"token": t, "score": s} for t, s in (("a", 1.0), (" b", -0.5), (" c", 0.1))]
    text = query.highlighted(tokens)
    assert text.plain == "a b c"
    assert [(span.start, span.end, span.style) for span in text.spans] == [(0, 1, "bold green"), (1, 3, "red")]
    assert query.highlighted([{"token": "a", "score": 0.0}]).spans == []
