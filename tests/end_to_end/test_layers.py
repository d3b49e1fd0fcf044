"""Whole jobs in process over models whose layers need more than Linear: a CNN, LoRA adapters, a mixture of experts."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from launch.config import make_config
from launch.job import score
from launch.run import Run
from launch.train import train_model
from tests.conftest import tiny_bert
from tests.end_to_end.answers import dense, oracle_scores, self_influence
from tests.end_to_end.conftest import write_texts
from tests.engine.test_routed import mixtral

MNIST = Path(__file__).parents[1] / "data" / "mnist.npz"
EXACT = {"projection": "none", "store": False, "coverage": 4}


def scored(settings: dict[str, Any]) -> tuple[Run, str]:
    """Run a job; return its run and what it said."""
    said: list[str] = []
    score(make_config(settings), said.append)
    return Run.open(settings["run"]), "\n".join(said)


def assert_close(run: Run, names: list[str] | None = None) -> None:
    scores, own, bound = oracle_scores(run, Path(), names)
    assert (np.abs(dense(run) - scores) <= 1e-5 * bound).all()
    assert np.allclose(self_influence(run), own, rtol=1e-4)


def image_job(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "task": {"name": "image-classification", "settings": {"factory": "tests.conftest:toy_cnn", "classes": 10}},
        "checkpoints": str(folder / "model"),
        "corpus": {"path": str(MNIST), "limit": 12},
        "queries": {"name": "asked", "path": str(MNIST), "limit": 3},
        "train": {"epochs": 2, "batch_size": 4, "checkpoints": 2, "learning_rate": 0.01},
        "cluster": {"backend": "in-process"},
        "output": {"top_k": 12, "label": "scores", "dense": True},
    } | sections  # fmt: skip


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN trained on a few digits, two checkpoints."""
    folder = tmp_path_factory.mktemp("cnn")
    train_model(make_config(image_job(folder)), lambda _: None)
    return folder


def test_a_cnn_on_images_scores_as_the_oracle_does(cnn: Path, tmp_path: Path) -> None:
    run, said = scored(image_job(cnn, run=str(tmp_path / "run"), gradients=EXACT))
    assert_close(run)
    assert "coverage: they carry 100.0%" in said
    assert "run alone" not in said


def test_a_cnn_from_a_store_of_projected_rows(cnn: Path, tmp_path: Path) -> None:
    """No side of its layers but one is wider than 48, so that two-sided rows of that size are nearly whole."""
    g = {"projection": "two-sided", "dim": 48, "dtype": "float32", "coverage": 0}
    run, _ = scored(image_job(cnn, run=str(tmp_path / "run"), gradients=g))
    assert_close(run)
    sizes = {
        r["parameter"]: (r["rows"], r["columns"]) for r in run.location.read_json("gradients/store.json")["ranges"]
    }
    assert sizes["grouped.weight"] == (6, 18)
    assert sizes["depthwise.weight"] == (6, 4)
    assert sizes["norm.weight"] == (4, 1)


def text_job(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "checkpoints": str(folder / "out"),
        "corpus": str(folder / "train.jsonl"),
        "queries": {"name": "asked", "path": str(folder / "asked.jsonl")},
        "gradients": EXACT,
        "cluster": {"backend": "in-process"},
        "output": {"top_k": 12, "label": "scores", "dense": True},
    } | sections


def train_adapter(folder: Path, tokenizer_folder: Path) -> None:
    """Train a LoRA adapter with the real Trainer on the model in base/, and leave its output folder `out` as it is."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "wrapped")
    tiny_bert().save_pretrained(folder / "base")
    model = type(tiny_bert()).from_pretrained(folder / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    data = [{"input_ids": tokenizer(r["text"])["input_ids"], "labels": r["label"]} for r in rows]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-1,
        save_strategy="epoch", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model=adapted, args=arguments, train_dataset=data, processing_class=tokenizer).train()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_texts(folder / "train.jsonl", 16)
    write_texts(folder / "asked.jsonl", 3, first=500)
    train_adapter(folder, tokenizer_folder)
    return folder


def test_a_trainer_folder_of_lora_adapters_needs_nothing_but_paths(lora: Path, tmp_path: Path) -> None:
    run, said = scored(text_job(lora, run=str(tmp_path / "run")))
    names = run.location.read_json(next(k for k in run.location.list("stages") if k.endswith(".found.json")))[
        "parameters"
    ]
    assert len(names) == 2 * 2 * 2 + 2
    assert all(".lora_" in name or ".modules_to_save." in name for name in names)
    assert_close(run, names)
    assert "is zero on all" not in said


def test_a_base_that_moved_is_named_by_the_user_and_one_that_changed_is_another_checkpoint(
    lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(lora, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "run", ignore_errors=True)
    (lora / "base").rename(lora / "gone")
    try:
        with pytest.raises(ValueError, match=r"Set task.settings.base to the folder of that model"):
            scored(text_job(tmp_path / "moved"))
        given = {"settings": {"base": str(tmp_path / "moved" / "base")}}
        run, _ = scored(text_job(tmp_path / "moved", task=given))
    finally:
        (lora / "gone").rename(lora / "base")
    before = [c.fingerprint for c in run.checkpoints()]
    weights = tmp_path / "moved" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(OSError, match=r"fingerprint"):
        scored(text_job(tmp_path / "moved", task=given))
    assert len(set(before)) == 2


def test_a_lora_matrix_that_gets_no_gradient_is_said(lora: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = type(tiny_bert()).from_pretrained(lora / "base")
    fresh = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    fresh.save_pretrained(tmp_path / "fresh")
    AutoTokenizer.from_pretrained(lora / "out" / "checkpoint-2").save_pretrained(tmp_path / "fresh")
    checkpoints = [{"path": str(tmp_path / "fresh"), "learning_rate": 0.1}]
    _, said = scored(text_job(lora, run=str(tmp_path / "run"), checkpoints=checkpoints))
    assert (
        "warning: the gradient of base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
        in said
    )
    assert "is zero on all 4 examples" in said


def test_a_mixture_of_experts_runs_every_example_alone_and_says_so(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "train.jsonl", 8)
    write_texts(tmp_path / "asked.jsonl", 2, first=500)
    for step in (1, 2):
        model = mixtral()
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj += 0.1 * step
            model.lm_head.weight += 0.1 * step
        here = tmp_path / "out" / f"checkpoint-{step}"
        model.save_pretrained(here)
        config = json.loads((here / "config.json").read_text())
        (here / "config.json").write_text(
            json.dumps(config | {"experts_implementation": "eager"})
        )  # float64 for the oracle
        shutil.copytree(tokenizer_folder / "plain", here, dirs_exist_ok=True)
    task = {"name": "causal-lm", "settings": {"max_tokens": 16}}
    rate = {"path": str(tmp_path / "out"), "learning_rate": 0.1}
    run, said = scored(text_job(tmp_path, task=task, checkpoints=rate))
    names = ["lm_head.weight", "model.layers.0.mlp.experts.down_proj"]
    assert run.location.read_json("stages/score-scores.json")["gradients"]["token_budget"] == 1
    assert (
        "every example is run alone, which is slower: model.layers.0.mlp.experts.down_proj holds several experts"
        in said
    )
    assert_close(run, sorted(names))
