"""Token scores from a run: they add up to the stored scores, for language models only."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launch.query import answer, show
from launch.run import Run
from tests.conftest import tiny_gpt2
from tests.end_to_end.answers import everything
from tests.end_to_end.conftest import run_job, write_texts
from tests.masked_models import tiny_masked_bert, write_mask_tokenizer


def language_run(folder: Path, tokenizer_folder: Path, task: str, method: str, **gradients: object) -> Run:
    """Score 12 texts for 2 queries under two checkpoints of a tiny language model."""
    for number in (1, 2):
        model = tiny_gpt2(bos_token_id=None, eos_token_id=1) if task == "causal-lm" else tiny_masked_bert()
        for weight in model.parameters():
            weight.data *= 1 + 0.1 * number
        place = folder / f"model-{number}"
        model.save_pretrained(place)
        if task == "masked-lm":
            write_mask_tokenizer(place)
        else:
            for file in (tokenizer_folder / "plain").iterdir():
                (place / file.name).write_bytes(file.read_bytes())
    write_texts(folder / "train.jsonl", 12)
    write_texts(folder / "asked.jsonl", 2, first=900)
    return run_job({
        "run": str(folder / "run"), "task": {"name": task, "settings": {"max_tokens": 6}},
        "checkpoints": [{"path": str(folder / f"model-{n}"), "learning_rate": 0.1 * n} for n in (1, 2)],
        "corpus": str(folder / "train.jsonl"), "queries": str(folder / "asked.jsonl"),
        "gradients": {"modules": ["*"], "coverage": 0, "dtype": "float32", **gradients},
        "cluster": {"backend": "in-process"}, "output": {"top_k": 50}, "method": {"name": method},
    })  # fmt: skip


CASES = [
    ("causal-lm", "tracin", {}), ("causal-lm", "gradient-cosine", {"projection": "gaussian", "dim": 64}),
    ("masked-lm", "tracin", {"projection": "none"}), ("causal-lm", "tracin", {"projection": "none", "store": False}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "method", "gradients"), CASES)
def test_they_add_up_to_the_stored_scores(
    tmp_path: Path, tokenizer_folder: Path, task: str, method: str, gradients: dict
) -> None:
    run = language_run(tmp_path, tokenizer_folder, task, method, **gradients)
    rows = run.top(1, k=50).to_pylist()
    found = run.tokens(1, [row["id"] for row in rows])
    stored = np.array([row["score"] for row in rows])
    np.testing.assert_allclose([f.score for f in found], stored, rtol=2e-4, atol=2e-4 * np.abs(stored).max())
    assert [sum(f.scores) for f in found] == pytest.approx([f.score for f in found])
    texts = {row["id"]: row for row in everything(run, "train")}
    for one in found:
        assert len(one.tokens) == len(one.scores) == len(texts[one.id]["input_ids"])
        assert texts[one.id]["text"] in "".join(one.tokens)


def test_a_new_text_and_the_command(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = language_run(tmp_path, tokenizer_folder, "causal-lm", "tracin")
    found = answer(run, None, "the film was good", top=3, tokens=True)
    assert json.loads(json.dumps(found)) == found
    for row in found["proponents"] + found["opponents"]:
        assert sum(t["score"] for t in row["tokens"]) == pytest.approx(row["score"], rel=1e-3)
    stored = answer(run, "1", top=3, tokens=True)
    (same, *_) = run.tokens("source:r901", [stored["proponents"][0]["id"]])
    assert [t["score"] for t in stored["proponents"][0]["tokens"]] == same.scores
    show(stored, Console(width=120))
    assert "".join(t["token"] for t in stored["proponents"][0]["tokens"])[:20] in capsys.readouterr().out


def test_a_classifier_has_none(scored: Run) -> None:
    with pytest.raises(ValueError, match="task text-classification has no token scores: its loss is one number"):
        scored.tokens(0, [1], scores="first")


def test_an_example_that_is_not_there_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = language_run(tmp_path, tokenizer_folder, "causal-lm", "tracin")
    with pytest.raises(ValueError, match="example 99999 is not in corpus"):
        run.tokens(0, [99_999])
