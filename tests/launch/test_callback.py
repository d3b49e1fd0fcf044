"""The Trainer callback: exact learning rates at every checkpoint of a real training, resumed and pruned ones too."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from launch import InfluenceCallback
from launch.config import make_config
from launch.job import score
from launch.run import Run
from storage.checkpoints import RECORD, find_checkpoints
from tests.conftest import tiny_bert
from tests.end_to_end.conftest import write_texts

STEPS = 12  # 24 examples in batches of 4, two epochs


class WritesRates(InfluenceCallback):
    """What the optimizer really used, written down step by step: the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


def trainer(folder: Path, tokenizer_folder: Path, callback: Any, **changes: Any) -> Trainer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "wrapped")
    write_texts(folder / "train.jsonl", 24)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    data = [{"input_ids": tokenizer(r["text"])["input_ids"], "labels": r["label"]} for r in rows]
    optimizers = changes.pop("optimizers", (None, None))
    settings = {
        "output_dir": str(folder / "out"), "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "save_strategy": "steps", "save_steps": 3, "logging_steps": 5, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "lr_scheduler_type": "cosine", "warmup_steps": 2,
    } | changes  # fmt: skip
    model = tiny_bert()
    return Trainer(
        model=model, args=TrainingArguments(**settings), train_dataset=data, processing_class=tokenizer,
        callbacks=[callback], optimizers=optimizers(model) if callable(optimizers) else optimizers,
    )  # fmt: skip


def train(one: Trainer, **how: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        one.train(**how)


def test_every_checkpoint_has_the_rate_of_its_own_step(tmp_path: Path, tokenizer_folder: Path) -> None:
    callback = WritesRates()
    train(trainer(tmp_path, tokenizer_folder, callback))
    found = find_checkpoints(str(tmp_path / "out"), say=lambda _: None)
    assert [ref.step for ref in found] == [3, 6, 9, 12]
    assert {ref.how for ref in found} == {"recorded"}
    assert [ref.learning_rate for ref in found] == [callback.used[step - 1] for step in (3, 6, 9, 12)]
    assert len(set(callback.used)) > 6  # a cosine: interpolating between logged steps would not be exact
    logged = {
        entry["step"]: entry["learning_rate"]
        for entry in json.loads((tmp_path / "out/checkpoint-12/trainer_state.json").read_text())["log_history"]
        if "learning_rate" in entry
    }
    assert all(rate == callback.used[step - 1] for step, rate in logged.items())  # the Trainer's own convention


def test_such_a_training_is_scored_without_a_word_on_rates(tmp_path: Path, tokenizer_folder: Path) -> None:
    callback = WritesRates()
    train(trainer(tmp_path, tokenizer_folder, callback))
    write_texts(tmp_path / "asked.jsonl", 2, first=500)
    said: list[str] = []
    config = {
        "run": str(tmp_path / "run"), "checkpoints": str(tmp_path / "out"), "corpus": str(tmp_path / "train.jsonl"),
        "queries": str(tmp_path / "asked.jsonl"), "cluster": {"backend": "in-process"},
        "gradients": {"modules": ["classifier"], "coverage": 0},
    }  # fmt: skip
    score(make_config(config), said.append)
    assert any("(recorded)" in line for line in said)
    used = [callback.used[step - 1] for step in (3, 6, 9, 12)]
    run = Run.open(config["run"])
    assert [c.learning_rate for c in run.checkpoints()] == used
    assert [state.weight for state in run.states()] == used


def test_a_resumed_training_adds_and_deleted_checkpoints_take_theirs_along(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = WritesRates()
    train(trainer(tmp_path / "a", tokenizer_folder, whole))
    train(trainer(tmp_path / "b", tokenizer_folder, InfluenceCallback(), save_total_limit=2))
    kept = find_checkpoints(str(tmp_path / "b/out"), say=lambda _: None)
    assert [(ref.step, ref.learning_rate) for ref in kept] == [(9, whole.used[8]), (12, whole.used[11])]
    assert len(list((tmp_path / "b/out").rglob(RECORD))) == 2
    resumed = WritesRates()
    train(
        trainer(tmp_path / "b", tokenizer_folder, resumed, save_total_limit=3),
        resume_from_checkpoint=str(tmp_path / "b/out/checkpoint-9"),
    )
    again = find_checkpoints(str(tmp_path / "b/out"), say=lambda _: None)
    assert [(ref.step, ref.learning_rate) for ref in again] == [(9, whole.used[8]), (12, whole.used[11])]
    assert resumed.used == whole.used[9:]


def test_only_the_process_that_saves_writes(tmp_path: Path) -> None:
    optimizer, state = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.5), TrainerState(global_step=7)
    (tmp_path / "checkpoint-7").mkdir()
    for saves in (False, True):
        args: Any = SimpleNamespace(should_save=saves, output_dir=str(tmp_path))
        callback = InfluenceCallback()
        callback.on_save(args, state, None)  # no step yet: nothing to say
        callback.on_optimizer_step(args, state, None, optimizer=optimizer)
        callback.on_save(args, state, None)
        assert (tmp_path / "checkpoint-7" / RECORD).exists() == saves
    assert json.loads((tmp_path / "checkpoint-7" / RECORD).read_text())["learning_rate"] == 0.5


@pytest.mark.parametrize("logging_steps", [5, 500])
def test_a_later_training_into_the_same_folder_is_not_given_the_old_rates(
    tmp_path: Path, tokenizer_folder: Path, logging_steps: int
) -> None:
    train(trainer(tmp_path, tokenizer_folder, InfluenceCallback(), logging_steps=logging_steps))
    changes = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": logging_steps}
    train(trainer(tmp_path, tokenizer_folder, TrainerCallback(), **changes))
    said: list[str] = []
    if logging_steps == 500:  # nothing is logged: not even the log tells the two trainings apart
        with pytest.raises(ValueError, match="the learning rate of checkpoint-3, .* is not logged"):
            find_checkpoints(str(tmp_path / "out"), say=said.append)
    else:
        assert {ref.learning_rate for ref in find_checkpoints(str(tmp_path / "out"), say=said.append)} == {1.0}
    assert len(said) == 4
    assert all(line.startswith(f"{RECORD} in ") and "is of another training than the record" in line for line in said)


def test_a_record_counts_where_the_checkpoint_was_copied_without_what_the_trainer_wrote(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    callback = WritesRates()
    train(trainer(tmp_path, tokenizer_folder, callback))
    shutil.copytree(tmp_path / "out/checkpoint-6", tmp_path / "copied")
    (tmp_path / "copied/training_args.bin").unlink()
    (tmp_path / "copied/trainer_state.json").unlink()
    [found] = find_checkpoints(str(tmp_path / "copied"))
    assert (found.learning_rate, found.how) == (callback.used[5], "recorded")


def two_rates(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, None]:
    head = list(model.classifier.parameters())
    body = [w for name, w in model.named_parameters() if not name.startswith("classifier")]
    return torch.optim.AdamW([{"params": body, "lr": 1e-4}, {"params": head, "lr": 1e-2}]), None


def test_several_rates_are_told_and_not_guessed(tmp_path: Path, tokenizer_folder: Path) -> None:
    one = trainer(tmp_path, tokenizer_folder, InfluenceCallback(), optimizers=two_rates, warmup_steps=0)
    with pytest.warns(UserWarning, match="several learning rates .* set checkpoints.learning_rate when scoring"):
        train(one)
    with pytest.raises(
        ValueError, match=r"checkpoint-3 are several \(.* weights\), and a checkpoint is weighed by one"
    ):
        find_checkpoints(str(tmp_path / "out"), say=lambda _: None)
    given = find_checkpoints(str(tmp_path / "out"), 0.1, say=lambda _: None)
    assert {(ref.learning_rate, ref.how) for ref in given} == {(0.1, "given")}


def test_a_search_is_refused(tmp_path: Path) -> None:
    state = TrainerState(is_hyper_param_search=True)
    with pytest.raises(ValueError, match="records one training: use it for the final one"):
        InfluenceCallback().on_train_begin(SimpleNamespace(), state, None)
