from pathlib import Path

import pytest

from actors.specs import CheckpointSpec, ModelSpec, StageMismatch, declare_stage, digest, first_difference
from storage.locations import Location


def test_a_stage_is_declared_once_and_compared_ever_after(tmp_path: Path) -> None:
    run = Location(str(tmp_path))
    settings = {"rows": 16, "projection": {"kind": "none", "sides": (1, 2)}}
    declare_stage(run, "collect", settings)
    declare_stage(run, "collect", {"projection": {"sides": [1, 2], "kind": "none"}, "rows": 16})
    with pytest.raises(StageMismatch) as error:
        declare_stage(run, "collect", settings | {"projection": {"kind": "none", "sides": (1, 3)}}, "another label")
    assert str(error.value) == (
        f"stage collect of run {run.uri} was made with projection.sides=[1, 2], this job has [1, 3]. "
        "Use another label, or restore that value."
    )


def test_a_record_follows_what_moved_and_refuses_what_changed(tmp_path: Path) -> None:
    run = Location(str(tmp_path))
    model = {"task": "causal-lm", "task_settings": {"tokenizer": "/a/words", "max_tokens": 8}}
    record = {"home": "/a/run", "model": model, "rows": 4}
    moved = {"home": "/b", "model": model | {"task_settings": {"tokenizer": "/b", "max_tokens": 8}}, "rows": 4}
    assert digest(record) == digest(moved)
    declare_stage(run, "score", record)
    declare_stage(run, "score", moved)
    stored = run.read_json("stages/score.json")
    assert stored == {**moved, "hash": digest(record)}
    for changed in (moved | {"rows": 5}, moved | {"model": model | {"task_settings": {"max_tokens": 9}}}):
        with pytest.raises(StageMismatch, match=r"was made with (rows=4|model.task_settings.max_tokens=8)"):
            declare_stage(run, "score", changed)
    assert run.read_json("stages/score.json") == stored


def test_the_settings_of_a_users_own_task_all_count() -> None:
    records = [{"model": {"task": "mine:Task", "task_settings": {"tokenizer": kind}}} for kind in ("words", "bytes")]
    assert digest(records[0]) != digest(records[1])


def test_the_first_difference_is_first_in_the_order_of_the_new_record() -> None:
    assert first_difference({"a": 1, "task": "x"}, {"task": "y", "a": 2}) == ("task", "x", "y")
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}) == ("a.c", 2, None)


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_a_model_names_its_checkpoints_and_records_the_rest() -> None:
    one = CheckpointSpec("c-1", "/models/c-1", 1, 0.1, "f")
    model = ModelSpec("causal-lm", {"max_tokens": 8}, (one,), "float32", "sdpa")
    assert model.checkpoint("c-1") is one
    assert model.record() == {
        "task": "causal-lm", "task_settings": {"max_tokens": 8}, "compute": "float32", "attention": "sdpa"
    }  # fmt: skip
