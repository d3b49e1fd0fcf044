"""Every mistake of a user: one message that names the value and what to do, status 1, no traceback, and nothing lost.

Where the run can go on, the same command with the input mended then works in the same run folder.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from launch.config import make_config
from launch.job import score
from launch.run import Run
from tests.end_to_end.answers import dense, events
from tests.end_to_end.conftest import Settings, Told, run_job, sentence, small, write_texts


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def good(number: int) -> dict[str, Any]:
    return {"id": f"r{number}", "text": sentence(number), "label": number % 3}


BAD_LINES: dict[str, tuple[Any, list[str]]] = {
    "malformed": ('{"text": "a film", "label": ', ["bad.jsonl line 3 is not JSON", '{"text": "a film"']),
    "no object": ("17", ["bad.jsonl line 3 must be a JSON object", "17"]),
    "missing text": ({"id": "x", "label": 1}, ["bad.jsonl line 3: field 'text' is None, a text is needed"]),
    "missing label": ({"id": "x", "text": "a film"}, ["bad.jsonl line 3: field 'label' is missing"]),
    "label out of range": ({"text": "a film", "label": 7}, ["line 3: field 'label' is 7, allowed: 0 to 2"]),
    "label of no kind": ({"text": "a film", "label": "fine"}, ["line 3: field 'label' is 'fine', allowed: 0 to 2"]),
}


@pytest.mark.parametrize("where", ["corpus", "queries"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_and_the_mended_file_goes_on(
    settings: Settings, told: Told, tmp_path: Path, kind: str, where: str
) -> None:
    line, parts = BAD_LINES[kind]
    file = write_lines(tmp_path / "bad.jsonl", good(0), good(1), line)
    config = small(settings, **{where: {"path": str(file)}})
    message = told(config)
    assert all(part in message for part in parts), message
    write_lines(file, good(0), good(1), good(2))
    assert len(run_job(config).top(0, k=2)) == (3 if where == "corpus" else 4)  # three rows, on one side each


@pytest.mark.parametrize("where", ["corpus", "queries"])
@pytest.mark.parametrize(("content", "part"), [(None, "is not there"), ("", "has no records")])
def test_a_missing_or_empty_source_is_named(
    settings: Settings, told: Told, tmp_path: Path, where: str, content: str | None, part: str
) -> None:
    file = tmp_path / "reviews.jsonl"
    if content is not None:
        file.write_text(content)
    config = small(settings, **{where: {"path": str(file)}})
    assert part in told(config)
    write_texts(file, 4)
    run_job(config)


def test_a_wrong_field_of_the_task_may_be_mended_before_any_row_is_kept(settings: Settings, told: Told) -> None:
    message = told(small(settings, task={"settings": {"max_tokens": 16, "label_field": "labels"}}))
    assert "line 1: field 'labels' is missing" in message
    run_job(small(settings))


def test_no_queries(settings: Settings, told: Told) -> None:
    assert "queries is missing: say which predictions" in told(small(settings, queries=None))


def test_long_texts_are_cut_and_counted(settings: Settings, tmp_path: Path) -> None:
    lines = [good(0), {"text": "film " * 40, "label": 1}, good(2)]
    config = small(settings, corpus={"path": str(write_lines(tmp_path / "long.jsonl", *lines))})
    said: list[str] = []
    score(make_config(config), said.append)
    assert any("train: 3 examples of 3 records" in line and "1 truncated, 0 chunked" in line for line in said)


def test_a_text_longer_than_the_model_reads_is_named(settings: Settings, told: Told, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "long.jsonl", good(0), {"text": "film " * 40, "label": 1})
    config = small(settings, corpus={"path": str(file)}, task={"settings": {"max_tokens": 64}})
    message = told(config)
    assert "line 2: the example has 42 tokens, the model 16 positions: set task.settings.max_tokens=16" in message
    run_job(small(settings, corpus={"path": str(file)}))


@pytest.fixture
def language_model(tmp_path: Path, tokenizer_folder: Path) -> Path:
    from tests.conftest import tiny_gpt2

    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    shutil.copytree(tokenizer_folder / "plain", tmp_path / "gpt2", dirs_exist_ok=True)
    return tmp_path / "gpt2"


def test_documents_without_a_loss_bearing_token_are_named_and_long_ones_chunked(
    settings: Settings, told: Told, tmp_path: Path, language_model: Path
) -> None:
    file = write_lines(tmp_path / "documents.jsonl", {"text": "film " * 40}, {"text": "film"})
    config = small(
        settings,
        task={"name": "causal-lm", "settings": {"max_tokens": 16, "append_end": False}},
        checkpoints={"path": str(language_model), "learning_rate": 0.1},
        corpus={"path": str(file)},
        queries={"path": str(write_lines(tmp_path / "asked.jsonl", {"text": "the film was good"}))},
        gradients={"modules": ["transformer.h.1.mlp.c_proj"]},
    )
    assert "documents.jsonl line 2: the example has no loss-bearing token" in told(config)
    write_lines(file, {"text": "film " * 40}, {"text": "a film"})
    said: list[str] = []
    score(make_config(config), said.append)
    assert any("train: 4 examples of 2 records" in line and "0 truncated, 1 chunked" in line for line in said)
    run = Run.open(config["run"])
    with pytest.raises(ValueError, match="takes no label: leave it out"):
        run.score(["a film"], ["1"])


@pytest.fixture
def broken_word(inputs: Path, tmp_path: Path) -> Path:
    """Checkpoints whose embedding of the word `never` is not finite: examples with it have no finite loss."""
    folder = tmp_path / "broken"
    shutil.copytree(inputs / "model", folder)
    for file in folder.glob("*/model.safetensors"):
        state = safetensors.torch.load_file(file)
        state["bert.embeddings.word_embeddings.weight"][5 + 10] = float("nan")
        safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.filterwarnings("ignore:no per-example gradients")
def test_rows_that_are_not_finite_are_set_aside_and_named(
    settings: Settings, told: Told, tmp_path: Path, broken_word: Path, store: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": f"r{i}", "text": "never" if i == 3 else "a good film", "label": i % 3} for i in range(8)]
    config = small(
        settings,
        checkpoints={"path": str(broken_word)},
        corpus={"path": str(write_lines(tmp_path / "train.jsonl", *lines))},
        queries={"path": str(write_lines(tmp_path / "asked.jsonl", *lines[:2]))},
        gradients={"modules": ["classifier"], "store": store, "coverage": 8},
    )
    message = told(config)
    assert "id 3: the loss under checkpoint-10" in message
    assert "cluster.max_bad_fraction=0.001 of the stage is allowed" in message
    capsys.readouterr()
    run = run_job(config | {"cluster": {"backend": "in-process", "max_bad_fraction": 0.5}})
    closing = capsys.readouterr().err.rpartition("tokens/s")[2]
    assert "set aside, not finite: id 3: the loss under checkpoint-10" in closing
    noted = [event for event in events(run) if event["kind"] == "quarantined"]
    assert noted[0]["rows"] == {"3": "the loss under checkpoint-10"}
    example = run.index().example(3)
    assert example["quarantined"]
    assert example["total"] is None
    assert 3 not in run.top(0, k=50).column("id").to_pylist()
    assert dense(run)[[0, 1, 2, 4, 5, 6, 7]].shape == (7, 2)


def test_a_gradient_that_is_not_finite_is_named_with_its_module(
    settings: Settings, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.tasks.text_classification import TextClassification

    whole = TextClassification.loss

    def loss(self: TextClassification, model: Any, batch: Any) -> torch.Tensor:
        losses = whole(self, model, batch)
        zero = torch.where(batch.ids == 2, losses - losses.detach(), 1.0)  # its root has an infinite slope
        return torch.where(batch.ids == 2, zero.sqrt(), losses)

    monkeypatch.setattr(TextClassification, "loss", loss)
    config = small(settings, queries={"path": settings()["queries"]["path"], "limit": 1})
    assert "1 of 16 rows are not finite: id 2: the gradient of classifier.weight under checkpoint-10." in told(config)


def test_all_rows_may_be_bad_if_the_user_says_so(settings: Settings, tmp_path: Path, broken_word: Path) -> None:
    lines = [{"text": "never", "label": 0}] * 20 + [{"text": "a film", "label": 0}]
    config = small(
        settings,
        checkpoints={"path": str(broken_word)},
        corpus={"path": str(write_lines(tmp_path / "train.jsonl", *lines))},
        queries={"path": str(write_lines(tmp_path / "asked.jsonl", good(1)))},
        cluster={"max_bad_fraction": 1},
    )
    assert run_job(config).top(0, k=50).column("id").to_pylist() == [20]


def test_a_query_that_is_not_finite_is_named(settings: Settings, told: Told, tmp_path: Path, broken_word: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", *({"text": "a good film", "label": i % 3} for i in range(4)))
    asked = write_lines(
        tmp_path / "asked.jsonl", {"text": "a film", "label": 0}, {"text": "never", "label": 1, "id": 9}
    )
    config = small(
        settings, checkpoints={"path": str(broken_word)}, corpus={"path": str(train)},
        queries={"name": "asked", "path": str(asked)}, output={"label": None},
    )  # fmt: skip
    message = told(config)
    assert "query 1 (source:9) is not finite: the loss under checkpoint-10" in message
    assert "under a new queries.name" in message
    mended = write_lines(tmp_path / "mended.jsonl", {"text": "a film", "label": 0})
    run = run_job(config | {"queries": {"name": "mended", "path": str(mended)}})
    with pytest.raises(FloatingPointError, match=r"query \(new\) is not finite"):
        run.score(["never"])


def test_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "launch/score.py", str(tmp_path / "none.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: config {tmp_path}/none.yaml is not there")
    assert len(ended.stderr.splitlines()) == 1
