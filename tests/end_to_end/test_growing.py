"""A run grows: examples at the end of its corpus, checkpoints; what it held stays, byte for byte."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.config import make_config
from launch.job import score
from launch.run import Run
from storage.corpus import Corpus
from storage.journal import Journal
from storage.verify import verify
from tests.end_to_end.answers import dense, digests
from tests.end_to_end.conftest import Settings, Told, run_job, write_texts


def grow(file: Path, count: int) -> None:
    write_texts(file.with_name("more.jsonl"), count, first=500)
    with file.open("a") as source:
        source.write(file.with_name("more.jsonl").read_text())


@pytest.mark.parametrize("store", [True, False])
def test_a_corpus_that_grew_at_its_end(settings: Settings, told: Told, tmp_path: Path, store: bool) -> None:
    file = write_texts(tmp_path / "train.jsonl", 20)
    config = settings(corpus=str(file), gradients={"store": store})
    before = digests(run_job(config), "")
    grow(file, 9)
    message = told(config)
    assert "was made with examples=None, this job has 29. Use another output.label" in message
    said: list[str] = []
    config = settings(corpus=str(file), gradients={"store": store}, output={"label": "grown"})
    score(make_config(config), said.append)
    run = Run.open(config["run"])
    corpus = Corpus.open(run.location, "train")
    assert [(s.name, s.base, s.rows) for s in corpus.segments] == [("000000.0", 0, 20), ("000001.0", 20, 9)]
    kept = digests(run, "")
    assert {key for key, data in before.items() if kept[key] != data and "/run/lease." not in key} == set()
    assert dense(run, "grown").shape == (29, 5)
    np.testing.assert_array_equal(dense(run, "grown")[:20], dense(run, "scores"))
    assert not verify(run.location).damages
    if store:
        assert len(Journal(run.location, "collect-train").done()) == 9
    whole = run_job(settings(run=str(tmp_path / "whole"), corpus=str(file), gradients={"store": store}))
    np.testing.assert_allclose(dense(run, "grown"), dense(whole), atol=2e-6)  # other shards, other batches
    grow(file, 2)
    write_texts(tmp_path / "train.jsonl", 31, first=1)
    assert "was made with source_id='r0' at" in told(config)


def test_a_grown_corpus_gets_scores_of_its_own_without_a_label(settings: Settings, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "train.jsonl", 8)
    config = settings(corpus=str(file), output={"label": None})
    run_job(config)
    grow(file, 2)
    score(make_config(config), lambda _: None)
    assert len(Run(Run.open(config["run"]).location).labels) == 2
    score(make_config(config), lambda _: None)
    assert len(Run(Run.open(config["run"]).location).labels) == 2, "and once only"


def test_a_checkpoint_more_is_collected_alone(settings: Settings, inputs: Path) -> None:
    paths = [str(inputs / "model" / f"checkpoint-{step}") for step in (10, 20, 30)]
    log = json.loads((Path(paths[-1]) / "trainer_state.json").read_text())["log_history"]
    listed = [{"path": path, "learning_rate": entry["learning_rate"]} for path, entry in zip(paths, log, strict=True)]
    run = run_job(settings(checkpoints={"path": listed[:2]}))
    before = digests(run, "gradients")
    score(make_config(settings(checkpoints={"path": listed}, output={"label": "three"})), lambda _: None)
    after = digests(run, "gradients")
    assert {key: after[key] for key in before} == before
    assert {key.split("/")[2] for key in after.keys() - before.keys()} == {"checkpoint-30"}
    whole = run_job(settings(run=settings()["run"] + "-whole"))
    np.testing.assert_array_equal(dense(run, "three"), dense(whole))
