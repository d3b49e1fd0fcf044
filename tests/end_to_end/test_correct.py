"""Correcting a model: the step taken is the gradient step on the most helpful examples, and the anchors' loss falls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.tasks.contract import Task, load_task, with_model_folder
from launch import correct as command
from launch.config import make_config
from launch.correct import Correction, correct
from launch.run import Run
from tests.end_to_end.conftest import QUERIES, ROWS, tiny_job, write_texts
from tests.end_to_end.test_influence import WHOLE

pytest.importorskip("faiss")
METHOD = {"name": "fastif", "neighbours": 20, "recall_sample": 3, "depth": 10, "repetitions": 2}
LEARNED = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
RATE, POINTS = 0.05, 4

Make = Callable[..., dict[str, Any]]


def maker(inputs: Path, folder: Path) -> Make:
    """Make configs of a correction of the tiny job's model in this folder, of one round unless told otherwise."""
    held_out = write_texts(folder / "held.jsonl", 12, first=2000)

    def make(method: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        section = {
            "anchors": str(inputs / "queries.jsonl"), "held_out": str(held_out), "output": str(folder / "corrected"),
            "rounds": 1, "batch": QUERIES, "points": POINTS, "learning_rate": RATE,
        }  # fmt: skip
        return tiny_job(inputs, folder / "run", gradients=WHOLE, method=method or METHOD, correct=section | given)

    return make


@pytest.fixture
def asked(inputs: Path, tmp_path: Path) -> Make:
    return maker(inputs, tmp_path)


def run_quietly(data: dict[str, Any]) -> Correction:
    return correct(make_config(data), lambda _: None)


@pytest.fixture(scope="module")
def once(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Correction, dict[str, Any]]:
    """One round that several tests look at, and its config."""
    data = maker(inputs, tmp_path_factory.mktemp("once"))()
    return run_quietly(data), data


@pytest.fixture
def start(inputs: Path) -> Path:
    return inputs / "model" / "checkpoint-30"


def task_of(folder: Path) -> Task:
    return load_task("text-classification", with_model_folder("text-classification", {"max_tokens": 16}, folder))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(task_of(folder).build(folder).named_parameters())


def losses(folder: Path, file: Path | str) -> tuple[list[float], list[bool]]:
    """Return the loss of every record of a file by itself, and whether the model gets it right."""
    task: Any = task_of(folder)
    model, found, right = task.build(folder).eval(), [], []
    for record in map(json.loads, Path(file).read_text().splitlines()):
        batch = task.collate([record | task.encode(record)[0] | {"id": 0}])
        found.append(task.loss(model, batch).item())
        right.append(int(task.predict(model, batch)[0]) == record["label"])
    return found, right


def test_a_round_is_one_step_on_the_examples_with_the_largest_totals(once: Any, start: Path) -> None:
    found, data = once
    run = Run.open(data["run"])
    table = run.index().table("by_example", ["id", "total"])
    totals = {row["id"]: row["total"] for part in table for row in part.to_pylist() if row["total"] is not None}
    assert len(totals) == METHOD["neighbours"]  # one list of candidates for all anchors
    best = sorted(sorted(totals, key=lambda i: -totals[i])[:POINTS])
    log = json.loads((found.checkpoint / "trainer_state.json").read_text())["log_history"][-1]
    assert log["examples"] == best

    task: Any = task_of(start)
    model, corpus = task.build(start).eval(), run.corpus(run.index())
    loss = (
        sum(task.loss(model, task.collate([corpus.row(i) | task.encode(corpus.row(i))[0]]))[0] for i in best) / POINTS
    )
    named = dict(model.named_parameters())
    slopes = dict(zip(LEARNED, torch.autograd.grad(loss, [named[name] for name in LEARNED]), strict=True))
    for name, after in weights(found.checkpoint).items():
        moved = after - named[name]
        torch.testing.assert_close(moved, -RATE * slopes.get(name, torch.zeros_like(moved)), rtol=1e-3, atol=1e-6)
        assert name not in slopes or not torch.allclose(moved, -RATE * POINTS * slopes[name], rtol=1e-3, atol=1e-6)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_anchors_loss_falls_and_rises_along_the_opposite_step(
    once: Any, asked: Make, inputs: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = np.mean(losses(start, inputs / "queries.jsonl")[0])
    assert np.mean(losses(once[0].checkpoint, inputs / "queries.jsonl")[0]) < before
    down = command.descend
    monkeypatch.setattr(command, "descend", lambda *given: down(*given[:4], -given[4], *given[5:]))
    wrong = run_quietly(asked())
    assert np.mean(losses(wrong.checkpoint, inputs / "queries.jsonl")[0]) > before


def test_evaluation_is_the_mean_loss_and_the_share_of_right_answers(once: Any, start: Path) -> None:
    found, data = once
    for said, folder in ((found.before, start), (found.after, found.checkpoint)):
        own, right = losses(folder, data["correct"]["held_out"])
        assert said["loss"] == pytest.approx(np.mean(own), rel=1e-5)
        assert said["accuracy"] == pytest.approx(np.mean(right))


def test_a_correction_goes_on_where_it_was_stopped(once: Any, asked: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[str] = []
    learn = command.learn
    with monkeypatch.context() as patch:

        def stop_in_the_second(*given: Any) -> str:
            rounds.append("begun")
            if len(rounds) == 2:
                raise KeyboardInterrupt
            return learn(*given)

        patch.setattr(command, "learn", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_quietly(asked(rounds=2))
    said: list[str] = []
    found = correct(make_config(asked(rounds=2)), said.append)
    assert [line.split(":")[0] for line in said] == ["before", "round 2 of 2", "after"]
    first = found.checkpoint.with_name(found.checkpoint.name[:-1] + "1")
    alone = weights(once[0].checkpoint)
    assert all(torch.equal(weight, alone[name]) for name, weight in weights(first).items())
    assert any(not torch.equal(weight, alone[name]) for name, weight in weights(found.checkpoint).items())


def test_augmentation_learns_from_the_pool(asked: Make, tmp_path: Path) -> None:
    pool = write_texts(tmp_path / "pool.jsonl", 25, first=5000)
    data = asked(pool=str(pool))
    run_quietly(data)
    run = Run.open(data["run"] + "-augment")
    assert run.corpus(run.index()).rows == 25 != ROWS
    assert not Path(data["run"]).exists()


def test_steps_are_taken_on_a_gpu_unless_the_config_says_cpu(asked: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        for device, taken in (("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
            config = make_config(asked() | {"cluster": {"device": device}})
            assert command.own_device(config).type == (taken if there else "cpu")


@pytest.mark.parametrize(
    ("given", "method", "said"),
    [
        ({"batch": 99}, None, "correct.batch=99 is not allowed: "),
        ({"points": 0}, None, "correct.points=0 is not allowed: must be a whole number of at least 1"),
        ({"output": "s3://bucket/x"}, None, "correct.output='s3://bucket/x' is not allowed: name a local folder"),
        ({"held_out": "nowhere.jsonl"}, None, "nowhere.jsonl"),
        ({}, {"name": "tracin"}, "method.name='tracin' is not allowed: correct.py goes by influence. Use fastif."),
    ],
)
def test_bad_input_is_refused(asked: Make, given: dict, method: dict | None, said: str) -> None:
    with pytest.raises((ValueError, OSError)) as refused:
        run_quietly(asked(method, **given))
    assert said in str(refused.value)


def test_a_config_without_the_section_and_a_folder_of_others_are_refused(once: Any) -> None:
    data = once[1]
    with pytest.raises(ValueError, match="correct is missing: say which anchors"):
        run_quietly({name: section for name, section in data.items() if name != "correct"})
    with pytest.raises(ValueError, match="already holds other checkpoints: remove them, or name another"):
        run_quietly(data | {"correct": data["correct"] | {"seed": 5}})


def test_anchors_that_json_cannot_hold_are_refused(asked: Make, tmp_path: Path) -> None:
    path = tmp_path / "anchors.npz"
    np.savez(path, x=np.zeros((QUERIES, 2), np.float32), y=np.zeros(QUERIES, np.int64))
    with pytest.raises(ValueError, match="field .* of .*anchors.npz is a ndarray: anchors are written down as JSON"):
        run_quietly(asked(anchors=str(path)))
