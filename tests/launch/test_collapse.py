"""Near-identical examples once: in stored answers, in new ones and from Python; k counts groups."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.collapse import collapse_rows
from launch.query import answer, show
from launch.run import Run
from storage.corpus import Corpus
from tests.end_to_end.conftest import Settings, run_job, sentence

COPIES = 4


@pytest.fixture(scope="module")
def repeated(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose corpus holds every one of ten texts four times, written differently."""
    from tests.end_to_end.conftest import tiny_job

    folder = tmp_path_factory.mktemp("repeated")
    forms = [str, str.upper, "{}!".format, " {} ".format]
    rows = [{"id": f"{i}-{j}", "text": forms[j](sentence(i)), "label": i % 3} for j in range(COPIES) for i in range(10)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "corpus": str(folder / "train.jsonl"),
        "gradients": {"modules": ["classifier"]},
        "output": {"top_k": 20},
    }
    return run_job(tiny_job(inputs, folder / "run", **sections))


def words(run: Run, example: int) -> str:
    return Corpus.open(run.location, "train").row(example)["text"].strip(" !").lower()


def oracle(run: Run, rows: list[dict[str, Any]], k: int) -> list[tuple[int, list[int]]]:
    """Return the strongest of each text and the ids of the others, by plain equality of the known forms."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(words(run, row["id"]), []).append(row["id"])
    return [(ids[0], ids[1:]) for ids in groups.values()][:k]


def test_a_stored_answer_by_groups(repeated: Run) -> None:
    plain, found = answer(repeated, "0", top=20), answer(repeated, "0", top=2, collapse=True)
    for side in ("proponents", "opponents"):
        assert [(r["id"], r["near_identical"]) for r in found[side]] == oracle(repeated, plain[side], 2)
        about = found["collapsed"][side]
        assert about == {"looked_at": len(plain[side]), "groups": len(oracle(repeated, plain[side], 99))}
    assert found["collapsed"]["notes"] == []
    assert json.loads(json.dumps(found)) == found


def test_a_new_text_and_python_give_the_same_groups(repeated: Run) -> None:
    record = Corpus.open(repeated.location, "asked").row(0)
    stored = answer(repeated, "0", top=2, collapse=True)
    new = answer(repeated, None, record["text"], str(record["label"]), 2, collapse=True)
    table = repeated.top(0, k=2, collapse=True).to_pylist()
    (scored,) = repeated.score([record["text"]], [record["label"]], k=2, collapse=True)
    for side, name in (("proponents", "proponent"), ("opponents", "opponent")):
        expected = [{words(repeated, i) for i in [r["id"], *r["near_identical"]]} for r in stored[side]]
        for rows in (new[side], getattr(scored, side), [r for r in table if r["side"] == name]):
            assert [{words(repeated, i) for i in [r["id"], *r["near_identical"]]} for r in rows] == expected


def test_too_few_groups_are_said(repeated: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(repeated, "0", top=20, collapse=True)
    notes = " ".join(found["collapsed"]["notes"])
    for side in ("proponents", "opponents"):
        about = found["collapsed"][side]
        assert about["groups"] < 20
        assert f"{about['groups']} of 20 {side}" in notes
    show(found, Console(width=200))
    shown = capsys.readouterr().out
    assert "near-identical: " in shown
    assert "only " in shown


def test_examples_without_text_are_refused(repeated: Run) -> None:
    corpus = Corpus.open(repeated.location, "train")
    with pytest.raises(ValueError, match="these have no text in field 'words'"):
        collapse_rows([{"id": 0}], corpus, "words", 1)


def test_nothing_at_all_is_no_groups(settings: Settings, repeated: Run) -> None:
    assert collapse_rows([], Corpus.open(repeated.location, "train"), "text", 3).rows == []
