from pathlib import Path

import pytest

from actors.context import make_task
from actors.specs import StageMismatch
from launch.config import make_config
from launch.sources import (
    cache_folder,
    content,
    holds_rows,
    ingest_set,
    model_spec,
    record_identity,
    refuse_reserved,
    same_model,
)
from storage.corpus import Corpus
from storage.locations import Location
from tests.end_to_end.conftest import Settings, write_texts


def quiet(_: str) -> None: ...


def test_checkpoints_come_with_rates_and_fingerprints(settings: Settings) -> None:
    said: list[str] = []
    model, folders = model_spec(make_config(settings()), said.append)
    assert [(c.name, c.step) for c in model.checkpoints] == [(f"checkpoint-{s}", s) for s in (10, 20, 30)]
    assert [c.learning_rate for c in model.checkpoints] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert len({c.fingerprint for c in model.checkpoints}) == len(folders) == 3
    assert said[0] == "checkpoint-10: step 10, learning rate 0.1 (logged)"


def test_no_checkpoints(settings: Settings) -> None:
    with pytest.raises(ValueError, match="checkpoints is missing: name a Trainer output folder"):
        model_spec(make_config(settings(checkpoints=None)), quiet)


def test_a_run_is_about_one_thing_from_its_first_row_on(settings: Settings, tmp_path: Path) -> None:
    run, config = Location(str(tmp_path / "run")), make_config(settings())
    model, folders = model_spec(config, quiet)
    short = make_task(model, folders[0], cache_folder())
    long = make_task(model, folders[0], cache_folder())
    long.max_tokens = 512
    record_identity(run, model, folders[0], long)
    record_identity(run, model, folders[0], short)  # nothing rests on the first one yet
    assert run.read_json("manifest.json")["max_tokens"] == 16
    assert not holds_rows(run, "corpus")
    ingest_set(run, "train", config.corpus, short, "text-classification", folders[0], quiet)
    assert holds_rows(run, "corpus")
    record_identity(run, model, folders[0], short)
    with pytest.raises(StageMismatch, match="was made with max_tokens=16, this job has 512. Use another run"):
        record_identity(run, model, folders[0], long)
    assert run.read_json("manifest.json")["max_tokens"] == 16


def test_a_source_may_change_until_a_row_of_it_is_kept(settings: Settings, tmp_path: Path) -> None:
    run, config = Location(str(tmp_path / "run")), make_config(settings(corpus=str(tmp_path / "a.jsonl")))
    model, folders = model_spec(config, quiet)
    task = make_task(model, folders[0], cache_folder())
    (tmp_path / "a.jsonl").write_text('{"text": "a film"}\n')
    with pytest.raises(ValueError, match="line 1: field 'label' is missing"):
        ingest_set(run, "train", config.corpus, task, "text-classification", folders[0], quiet)
    for count in (3, 3):
        write_texts(tmp_path / "a.jsonl", count)
        ingest_set(run, "train", config.corpus, task, "text-classification", folders[0], quiet)
    assert Corpus.open(run, "train").rows == 3
    write_texts(tmp_path / "a.jsonl", 4)
    with pytest.raises(StageMismatch, match="corpus 'train' of run .* was made with content="):
        ingest_set(run, "train", config.corpus, task, "text-classification", folders[0], quiet)


def test_content_sees_names_sizes_and_ends(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", 3)
    before = content(str(tmp_path))
    assert content(str(tmp_path)) == before
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert content(str(tmp_path)) != before


def test_another_runs_weights_are_compared(settings: Settings, tmp_path: Path) -> None:
    home, run = Location(str(tmp_path / "home")), Location(str(tmp_path / "here"))
    model, folders = model_spec(make_config(settings()), quiet)
    task = make_task(model, folders[0], cache_folder())
    record_identity(run, model, folders[0], task)
    with pytest.raises(ValueError, match="holds no run"):
        same_model(home, run, model)
    record_identity(home, model, folders[0], task)
    same_model(home, run, model)
    home.create_json("stages/collect-train.json", {"model": {"compute": "bfloat16", "attention": "sdpa"}})
    with pytest.raises(
        ValueError, match="gradients.compute='float32' is not allowed: the rows of run.store=.* 'bfloat16'"
    ):
        same_model(home, run, model)
    home.delete("stages/collect-train.json")
    home.delete("checkpoints/checkpoint-10.json")
    with pytest.raises(ValueError, match="has no rows of checkpoint checkpoint-10 as it is here: fingerprint none"):
        same_model(home, run, model)
    home.delete("manifest.json")
    home.create_json("manifest.json", run.read_json("manifest.json") | {"max_tokens": 9})
    with pytest.raises(ValueError, match="is about something else: max_tokens is 9 there"):
        same_model(home, run, model)


@pytest.mark.parametrize("field", ["length", "chunk", "doc_id", "source_id"])
def test_a_field_that_a_users_task_would_find_replaced_is_refused(field: str) -> None:
    refuse_reserved({"id": 3, "text": "a"})
    with pytest.raises(ValueError, match=f"field '{field}' is a column of every corpus"):
        refuse_reserved({field: 3})
