"""A tiny job: three checkpoints of a tiny BERT, a tokenizer, forty training texts and five queries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import make_config
from launch.job import score
from launch.messages import plain_errors
from launch.run import Run
from tests.conftest import WORDS, tiny_bert

ROWS, QUERIES = 45, 5


def sentence(seed: int) -> str:
    """Return between 1 and 9 words that depend on the seed alone."""
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(1 + seed % 9))


def write_texts(path: Path, count: int, first: int = 0) -> Path:
    rows = [{"id": f"r{first + i}", "text": sentence(first + i), "label": (first + i) % 3} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_checkpoints(folder: Path, tokenizer: Path, count: int = 3) -> Path:
    """Leave `count` checkpoint folders as a Hugging Face Trainer does, learning rates falling."""
    log = [{"step": 10 * (i + 1), "learning_rate": 0.1 / (i + 1), "loss": 1.0} for i in range(count)]
    for i in range(count):
        model = tiny_bert()
        with torch.no_grad():
            for j, weight in enumerate(model.parameters()):
                weight += 0.05 * i * torch.sin(torch.arange(weight.numel()) + j).reshape(weight.shape)
        here = folder / f"checkpoint-{10 * (i + 1)}"
        model.save_pretrained(here)
        for file in (tokenizer / "wrapped").iterdir():
            (here / file.name).write_bytes(file.read_bytes())
        (here / "trainer_state.json").write_text(json.dumps({"global_step": 10 * (i + 1), "log_history": log}))
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A folder with train.jsonl, queries.jsonl and the checkpoints in model/."""
    folder = tmp_path_factory.mktemp("inputs")
    write_texts(folder / "train.jsonl", ROWS)
    write_texts(folder / "queries.jsonl", QUERIES, first=1000)
    write_checkpoints(folder / "model", tokenizer_folder)
    return folder


Settings = Callable[..., dict[str, Any]]


def tiny_job(inputs: Path, run: Path | str | dict[str, str], **sections: Any) -> dict[str, Any]:
    """Return a config of the tiny job as a mapping; keyword arguments replace or extend whole sections."""
    base: dict[str, Any] = {
        "run": run if isinstance(run, dict) else str(run),
        "task": {"settings": {"max_tokens": 16}},
        "checkpoints": str(inputs / "model"),
        "corpus": str(inputs / "train.jsonl"),
        "queries": {"name": "asked", "path": str(inputs / "queries.jsonl")},
        "gradients": {"modules": ["*"], "coverage": 0, "shard_rows": 16, "token_budget": 40},
        "cluster": {"backend": "in-process"},
        "output": {"top_k": 50, "label": "scores", "dense": True},
    }
    for name, value in sections.items():
        base[name] = base[name] | value if isinstance(value, dict) and isinstance(base.get(name), dict) else value
    return base


@pytest.fixture
def settings(inputs: Path, tmp_path: Path) -> Settings:
    """Make configs of the tiny job whose run lies in this test's folder."""

    def make(**sections: Any) -> dict[str, Any]:
        return tiny_job(inputs, **{"run": tmp_path / "run"} | sections)

    return make


def run_job(settings: dict[str, Any]) -> Run:
    """Run the job quietly and open its run."""
    score(make_config(settings), lambda _: None)
    return Run.open(settings["run"] if isinstance(settings["run"], str) else settings["run"]["uri"])


def small(settings: Settings, **sections: Any) -> dict[str, Any]:
    """Return a config that looks at the head alone."""
    return settings(**{"gradients": {"modules": ["classifier"]}} | sections)


Told = Callable[[dict[str, Any]], str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Run a job that must fail, and return the one message that it ends with."""

    def run(settings: dict[str, Any]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, plain_errors():
            score(make_config(settings), lambda _: None)
        assert ended.value.code == 1
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        messages = [line for line in shown.splitlines() if line.startswith(("error: ", "stopped: "))]
        assert len(messages) == 1, shown
        assert shown.splitlines()[-1] == messages[0], "the message ends the output"
        return messages[0]

    return run
