import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.config import make_config
from launch.train import main, train_model
from storage.checkpoints import find_checkpoints
from tests.conftest import tiny_bert
from tests.end_to_end.conftest import write_texts


@pytest.fixture
def training(tmp_path: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """A config that trains a tiny BERT for two epochs of ten texts."""
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    for file in (tokenizer_folder / "wrapped").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    return {
        "run": str(tmp_path / "run"),
        "checkpoints": str(tmp_path / "out"),
        "corpus": str(write_texts(tmp_path / "train.jsonl", 10)),
        "task": {"settings": {"max_tokens": 16}},
        "train": {"base": str(base), "epochs": 2, "batch_size": 4, "checkpoints": 2, "schedule": "linear"},
    }


def quiet(_: str) -> None: ...


def test_checkpoints_are_left_as_a_trainer_leaves_them(training: dict[str, Any]) -> None:
    folder = train_model(make_config(training), quiet)
    found = find_checkpoints(str(folder))
    assert [(c.name, c.how) for c in found] == [("checkpoint-3", "logged"), ("checkpoint-6", "logged")]
    assert found[1].learning_rate == pytest.approx(1e-3 / 6)
    state = json.loads((folder / "checkpoint-6/trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"], len(state["log_history"])) == (6, 2.0, 6)


def test_the_same_config_trains_the_same_weights(training: dict[str, Any], tmp_path: Path) -> None:
    first = train_model(make_config(training), quiet)
    second = train_model(make_config(training | {"checkpoints": str(tmp_path / "again")}), quiet)
    name = "checkpoint-6/model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_finished_training_is_never_written_over(training: dict[str, Any]) -> None:
    folder = train_model(make_config(training), quiet)
    with pytest.raises(ValueError, match="already holds checkpoints: remove it, or set train.output"):
        train_model(make_config(training), quiet)
    other = training | {"train": training["train"] | {"output": f"{folder}-2"}}
    assert train_model(make_config(other), quiet) == Path(f"{folder}-2")


def test_a_training_that_an_earlier_version_stopped_goes_on(training: dict[str, Any]) -> None:
    """Earlier versions did not know train.minimum, and do not have it in what they say of a training."""
    folder = train_model(make_config(training), quiet)
    shutil.rmtree(folder / "checkpoint-6")
    file = folder / "checkpoint-3/trainer_state.json"
    assert "minimum" not in json.loads(file.read_text())["training"]["train"]
    said: list[str] = []
    train_model(make_config(training), said.append)
    assert said[0] == "going on from checkpoint-3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a film", "label": 9}', "train.jsonl line 1: field 'label' is 9, allowed: 0 to 2"),
        ('{"label": 1}', "train.jsonl line 1: field 'text' is None"),
        ("{", "train.jsonl line 1 is not JSON"),
        ("", "train.jsonl has no records"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(training: dict[str, Any], line: str, message: str) -> None:
    Path(training["corpus"]).write_text(f"{line}\n")
    with pytest.raises(ValueError, match="train.jsonl") as error:
        train_model(make_config(training), quiet)
    assert message in str(error.value)
    assert not Path(training["checkpoints"]).exists()
    write_texts(Path(training["corpus"]), 10)
    train_model(make_config(training), quiet)


@pytest.mark.parametrize("given", [None, ["a", "b"], "s3://bucket/out"])
def test_a_place_that_cannot_hold_checkpoints_is_refused(training: dict[str, Any], given: Any) -> None:
    with pytest.raises(ValueError, match="is not allowed: name a local folder for the checkpoints"):
        train_model(make_config(training | {"checkpoints": {"path": given}}), quiet)


def test_several_workers_need_ray(training: dict[str, Any]) -> None:
    several = training | {"train": training["train"] | {"workers": 2}, "cluster": {"backend": "in-process"}}
    with pytest.raises(ValueError, match="train.workers=2 needs Ray: leave out cluster.backend=in-process"):
        train_model(make_config(several), quiet)


def test_a_rate_that_is_too_high_stops_naming_step_and_examples(training: dict[str, Any]) -> None:
    steep = training["train"] | {"learning_rate": 1e30, "optimizer": "sgd"}
    with pytest.raises(FloatingPointError, match=r"training loss is not finite at step \d for examples \[\d"):
        train_model(make_config(training | {"train": steep}), quiet)


def test_a_text_longer_than_the_model_reads(training: dict[str, Any]) -> None:
    Path(training["corpus"]).write_text(json.dumps({"text": "film " * 40, "label": 1}) + "\n")
    longer = training | {"task": {"settings": {"max_tokens": 64}}}
    with pytest.raises(ValueError, match="line 1: the example has 42 tokens, the model 16 positions"):
        train_model(make_config(longer), quiet)


def test_a_command_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(str(tmp_path / "none.yaml"))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: config ")
