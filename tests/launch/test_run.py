from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.run import Run
from tests.end_to_end.conftest import Settings, run_job, write_texts


def test_top_is_a_table_of_both_sides(scored: Run) -> None:
    table = scored.top(1, k=4, scores="first")
    assert table.column("side").to_pylist() == ["proponent"] * 4 + ["opponent"] * 4
    assert {"rank", "id", "score", "source_id", "label", "snippet"} <= set(table.column_names)
    assert table.equals(scored.top("source:r1001", k=4, scores="first"))


def test_a_stored_query_asked_as_a_new_text_has_the_same_answer(scored: Run) -> None:
    for scores in ("first", "second"):
        table = scored.top(3, k=3, scores=scores)
        record = scored.location and next(iter(_records(scored, 3)))
        (found,) = scored.score([record["text"]], [record["label"]], k=3, scores=scores)
        assert [row["id"] for row in found.proponents + found.opponents] == table.column("id").to_pylist()
        stored = np.array(table.column("score"))
        fresh = np.array([row["score"] for row in found.proponents + found.opponents])
        assert np.allclose(fresh, stored, rtol=1e-4)


def _records(run: Run, row: int) -> list[dict[str, Any]]:
    from storage.corpus import Corpus

    return [Corpus.open(run.location, "asked").row(row)]


def test_without_a_label_the_model_predicts_one(scored: Run) -> None:
    (found,) = scored.score(["the film was dull"], k=1, scores="first")
    assert found.query["label"] in (0, 1, 2)


def test_checkpoints_are_in_order_of_training(scored: Run) -> None:
    assert [c.name for c in scored.checkpoints()] == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert len(scored.states("first")) == 3
    assert len(scored.states("second")) == 1


def test_scores_without_a_store_answer_no_new_text(settings: Settings) -> None:
    run = run_job(settings(gradients={"modules": ["classifier"], "store": False}))
    with pytest.raises(ValueError, match="cannot answer a new text at once: they were made without a store"):
        run.score(["a film"])


def test_a_task_without_text_says_so(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.context.make_task", lambda *_: object())
    with pytest.raises(ValueError, match="task text-classification reads no text: store such queries"):
        scored.score(["a film"], scores="first")


def test_a_run_whose_weights_changed_does_not_answer(settings: Settings, inputs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(inputs / "model", tmp_path / "model")
    run = run_job(settings(checkpoints=str(tmp_path / "model"), gradients={"modules": ["classifier"]}))
    shutil.copy(inputs / "model/checkpoint-10/model.safetensors", tmp_path / "model/checkpoint-30/model.safetensors")
    with pytest.raises(ValueError, match="checkpoint-30 has changed since this run began: restore it, or use another"):
        Run.open(run.location.uri).score(["a film"], [1])


def test_an_unfinished_run_says_what_to_do(tmp_path: Path) -> None:
    write_texts(tmp_path / "train.jsonl", 1)
    with pytest.raises(FileNotFoundError, match="holds no scores: run launch/score.py, or check the path"):
        Run.open(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": "a film"}, "texts='a film' is one text: give a list"),
        ({"texts": ["a", "film"], "labels": [1]}, r"labels=\[1\] is not allowed: a list of 2, one for every query"),
        ({"texts": ["film"], "labels": "1"}, "labels='1' is not allowed: a list of 1"),
        ({"texts": ["film"], "labels": []}, r"labels=\[\] is not allowed: a list of 1"),
        ({"texts": ["film"], "labels": [1], "k": 0}, "k=0 is not allowed: must be at least 1"),
        ({"texts": ["film"], "labels": [1], "k": 0, "collapse": True}, "k=0 is not allowed: must be at least 1"),
        ({"texts": ["film"], "labels": [3]}, "field 'label' is 3, allowed: 0 to 2"),
    ],
)
def test_a_wrong_question_is_told(scored: Run, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored.score(**given, scores="first")


@pytest.mark.parametrize("collapse", [False, True])
def test_none_asked_for_is_told(scored: Run, collapse: bool) -> None:
    with pytest.raises(ValueError, match="top=0 is not allowed: must be at least 1"):
        scored.top(0, k=0, scores="first", collapse=collapse)


def test_no_texts_have_no_answers(scored: Run) -> None:
    assert scored.score([], scores="first") == []


def test_a_missing_field_is_named(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="field 'text' is None, a text is needed"):
        scored.ask([{"words": "a film"}], [1], setting=scored.setting("first"))
    setting = scored.setting("first")
    monkeypatch.setattr(setting.task, "collate", lambda rows: [row["rooms"] for row in rows])
    with pytest.raises(
        ValueError, match="the query has no field 'rooms', which task text-classification reads: it has"
    ):
        scored.ask([{"text": "a film"}], [1], setting=setting)


def test_a_lost_checkpoint_record_is_named(settings: Settings) -> None:
    run = run_job(settings(gradients={"modules": ["classifier"]}))
    run.location.delete("checkpoints/checkpoint-20.json")
    with pytest.raises(FileNotFoundError, match="lacks checkpoints/checkpoint-20.json, which scores scores were made"):
        run.score(["a film"], [1])
