from pathlib import Path
from typing import Any

import pytest

from launch import paths
from launch.config import make_config
from launch.paths import IN_RAY_JOB, refuse_relative_paths

ABSOLUTE: dict[str, Any] = {
    "run": "s3://bucket/run", "corpus": "/data/train.jsonl", "queries": "package:demo/asked.jsonl",
    "checkpoints": [{"path": "/models/a"}, "/models/b"],
}  # fmt: skip


def stage(**sections: Any) -> dict[str, Any]:
    """Return the sections of a job of two stages, with these in pretraining's."""
    pretrain = {"corpus": "/data/pre.jsonl", "checkpoints": "/models/pre", "shared": {"w": "w"}}
    return {"method": "multistage", "pretrain": pretrain | sections}


def test_outside_a_job_every_path_may_be_relative() -> None:
    refuse_relative_paths(make_config({"run": "a", "corpus": "b", "queries": "c", "checkpoints": "d"}))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"run": "runs/a"}, "run.uri='runs/a'"),
        ({"run": {"uri": "/a", "store": "runs/b"}}, "run.store='runs/b'"),
        ({"checkpoints": "model"}, "checkpoints.path='model'"),
        ({"checkpoints": ["/a", {"path": "model"}]}, "checkpoints.path='model'"),
        ({"task": {"settings": {"tokenizer": "words"}}}, "task.settings.tokenizer='words'"),
        ({"corpus": "train.jsonl"}, "corpus.path='train.jsonl'"),
        ({"queries": "test.jsonl"}, "queries.path='test.jsonl'"),
        (stage(corpus="pre.jsonl"), "pretrain.corpus.path='pre.jsonl'"),
        (stage(checkpoints="pre"), "pretrain.checkpoints.path='pre'"),
        (stage(task={"settings": {"tokenizer": "words"}}), "pretrain.task.settings.tokenizer='words'"),
    ],
)
def test_inside_a_job_a_relative_path_is_refused(
    sections: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(IN_RAY_JOB, "{}")
    refuse_relative_paths(make_config(ABSOLUTE))
    with pytest.raises(ValueError, match="is relative, which is not allowed inside a Ray job") as error:
        refuse_relative_paths(make_config(ABSOLUTE | sections))
    assert str(error.value).startswith(named)


def test_a_folder_that_a_node_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.specs import CheckpointSpec, ModelSpec
    from storage.locations import Location

    run, asked = Location(str(tmp_path)), []
    other, model = (
        ModelSpec("t", {}, (CheckpointSpec("c", str(tmp_path / name), 1, 0.1, "f"),), "float32", "sdpa")
        for name in ("pretrained", "model")
    )

    def blind(files: list[str]) -> list[str]:
        asked.extend(files)
        return ["node-2"] if str(tmp_path / "model") in files else []

    monkeypatch.setattr(paths, "nodes_that_cannot_read", blind)
    with pytest.raises(ValueError, match="model is not there on node-2: with several nodes a local path must be on"):
        paths.refuse_unseen_paths(run, [other, model], None)
    assert asked[0].startswith(f"{tmp_path}/.token-")
    assert run.list() == [], "the token is gone"
