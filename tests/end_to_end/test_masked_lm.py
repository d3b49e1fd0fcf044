"""A masked language model through the whole job: trained here, scored, asked; scores equal the oracle's."""

import re
from pathlib import Path

import numpy as np
import pytest

from launch.config import make_config
from launch.job import score
from launch.query import answer
from launch.run import Run
from launch.train import train_model
from tests.end_to_end.answers import dense, everything, oracle_scores
from tests.end_to_end.conftest import write_texts
from tests.masked_models import tiny_masked_bert, write_mask_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run over chunked documents under two checkpoints of a tiny BERT, and what the job said."""
    folder = tmp_path_factory.mktemp("masked")
    base = folder / "base"
    tiny_masked_bert().save_pretrained(base)
    write_mask_tokenizer(base)
    write_texts(folder / "train.jsonl", 25)
    write_texts(folder / "asked.jsonl", 5, first=100)
    config = make_config({
        "run": str(folder / "run"), "task": {"name": "masked-lm", "settings": {"max_tokens": 8}},
        "checkpoints": str(folder / "model"), "corpus": str(folder / "train.jsonl"),
        "queries": {"name": "asked", "path": str(folder / "asked.jsonl"), "limit": 5},
        "train": {"base": str(base), "epochs": 2, "batch_size": 8, "checkpoints": 2, "optimizer": "sgd", "learning_rate": 0.01},
        "gradients": {"projection": "none", "dtype": "float32", "shard_rows": 16, "token_budget": 40},
        "cluster": {"backend": "in-process"}, "output": {"top_k": 9, "label": "scores", "dense": True},
    })  # fmt: skip
    said: list[str] = []
    train_model(config, said.append)
    score(config, said.append)
    return Run.open(str(folder / "run")), "\n".join(said)


def test_scores_equal_the_oracle(trained: tuple[Run, str]) -> None:
    run, said = trained
    assert re.search(r"train: \d+ examples of 25 records, .* [1-9]\d* chunked", said)
    model = Path(run.checkpoints()[0].uri).parent
    scores, _, bound = oracle_scores(run, model)
    assert (np.abs(dense(run) - scores) <= 1e-5 * bound).all()
    assert np.abs(scores).max() > 0


def test_every_example_hides_a_token_and_nothing_is_left_out(trained: tuple[Run, str]) -> None:
    run, said = trained
    assert "warning" not in said  # the coverage report saw all of the gradient, the tied decoder's bias too
    rows = everything(run, "train")
    assert run.index().meta["granularity"] == "chunk"
    assert max(len(row["input_ids"]) for row in rows) == 8
    assert all(row["counted"].any() and not row["counted"][[0, -1]].any() for row in rows)


def test_new_texts_and_tokens_are_answered(trained: tuple[Run, str]) -> None:
    run, _ = trained
    found = answer(run, None, "the film was good", top=2, tokens=True)
    assert found["search"] == "exact"
    for row in found["proponents"] + found["opponents"]:
        assert sum(t["score"] for t in row["tokens"]) == pytest.approx(row["score"], rel=1e-3)
        assert any(t["score"] == 0 for t in row["tokens"])  # the tokens that are not hidden
    with pytest.raises(ValueError, match="task masked-lm takes no label: leave it out"):
        run.score(["the film"], labels=[1])
