import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors.context import cache_folder, make_task
from actors.specs import StageMismatch
from launch.config import make_config
from launch.sources import (
    content,
    holds_rows,
    ingest_set,
    model_spec,
    record_identity,
    refuse_reserved,
    same_model,
    tokenizer_fingerprint,
)
from storage.corpus import Corpus
from storage.locations import Location
from storage.segments import SourceChanged
from tests.end_to_end.conftest import Settings, write_texts


def quiet(_: str) -> None: ...


def test_checkpoints_come_with_rates_and_fingerprints(settings: Settings) -> None:
    said: list[str] = []
    model, folders = model_spec(make_config(settings()), said.append)
    assert [(c.name, c.step) for c in model.checkpoints] == [(f"checkpoint-{s}", s) for s in (10, 20, 30)]
    assert [c.learning_rate for c in model.checkpoints] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert len({c.fingerprint for c in model.checkpoints}) == len(folders) == 3
    assert said[0] == "checkpoint-10: step 10, learning rate 0.1 (logged)"


def logged(inputs: Path, folder: Path, losses: dict[int, dict[str, float]]) -> str:
    """Copy the checkpoints to a folder whose log holds these losses by step."""
    shutil.copytree(inputs / "model", folder)
    log = [{"step": step, "learning_rate": 0.1, **entry} for step, entry in losses.items()]
    for state in folder.glob("*/trainer_state.json"):
        state.write_text(json.dumps({"global_step": 0, "log_history": log}))
    return str(folder)


def test_a_loss_of_the_kind_that_is_not_used_may_be_anything(inputs: Path, settings: Settings, tmp_path: Path) -> None:
    losses = {10: {"loss": 2.0}, 20: {"loss": 1.0, "eval_loss": math.nan}, 30: {"loss": 0.5}}
    folder = logged(inputs, tmp_path / "out", losses)
    model, _ = model_spec(make_config(settings(checkpoints={"path": folder, "choose": 1})), quiet)
    assert [v.loss for v in model.choice] == [2.0, 1.0, 0.5]
    losses = {10: {"eval_loss": 2.0}, 20: {"eval_loss": math.nan}, 30: {"loss": 0.5, "eval_loss": 1.0}}
    bad = logged(inputs, tmp_path / "bad", losses)
    with pytest.raises(ValueError, match="the loss logged at step 20 is nan"):
        model_spec(make_config(settings(checkpoints={"path": bad, "choose": 1})), quiet)


def test_checkpoints_are_chosen_by_the_logged_loss_and_the_reasons_told(
    inputs: Path, settings: Settings, tmp_path: Path
) -> None:
    folder = logged(
        inputs, tmp_path / "out", {5: {"loss": 2.0}, 10: {"loss": 1.0}, 20: {"loss": 1.6}, 30: {"loss": 0.5}}
    )
    said: list[str] = []
    model, folders = model_spec(make_config(settings(checkpoints={"path": folder, "choose": 1})), said.append)
    assert [c.name for c in model.checkpoints] == [folder.name for folder in folders] == ["checkpoint-30"]
    assert [(v.name, v.step, v.loss, v.kept) for v in model.choice] == [
        ("checkpoint-10", 10, 1.5, False), ("checkpoint-20", 20, 1.6, False), ("checkpoint-30", 30, 0.5, True),
    ]  # fmt: skip
    assert said == [
        "checkpoint-10: left out at loss 1.5, noisy start: more than half of the decrease was lost again",
        "checkpoint-20: left out at loss 1.6, noisy start: more than half of the decrease was lost again",
        "checkpoint-30: kept at loss 0.5, part 1 of 1 of the fall",
        "checkpoint-30: step 30, learning rate 0.1 (logged)",
    ]
    assert "choice" not in model.record()
    assert model_spec(make_config(settings(checkpoints=folder)), quiet)[0].choice == ()


def test_the_evaluation_loss_tells_where_it_is_logged_for_more_checkpoints(
    inputs: Path, settings: Settings, tmp_path: Path
) -> None:
    evaluated = {10: {"eval_loss": 3.0}, 20: {"eval_loss": 2.0}, 30: {"eval_loss": 1.0, "loss": 0.5}}
    both = {step: entry | {"loss": 4.0 / step} for step, entry in evaluated.items()}
    for name, losses, first in (("eval", evaluated, 3.0), ("both", both, 0.4)):
        path = logged(inputs, tmp_path / name, losses)
        model, _ = model_spec(make_config(settings(checkpoints={"path": path, "choose": 2})), quiet)
        assert model.choice[0].loss == first
        assert [c.step for c in model.checkpoints] == [20, 30]


def test_a_choice_without_losses_or_among_too_few_is_refused(inputs: Path, settings: Settings, tmp_path: Path) -> None:
    silent = logged(inputs, tmp_path / "silent", {10: {}})
    with pytest.raises(ValueError, match=r"checkpoints.choose=2 is not possible: checkpoint-30 logs no loss .* List"):
        model_spec(make_config(settings(checkpoints={"path": silent, "choose": 2})), quiet)
    with pytest.raises(ValueError, match=r"of 3 checkpoints 0 lie where .* \(1: first, 2: no decrease\)"):
        model_spec(make_config(settings(checkpoints={"path": str(inputs / "model"), "choose": 2})), quiet)
    with pytest.raises(ValueError, match="checkpoints.choose=0 is not allowed: must be a whole number of at least 1"):
        make_config(settings(checkpoints={"path": silent, "choose": 0}))


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
    write_texts(tmp_path / "a.jsonl", 4, first=1)
    with pytest.raises(SourceChanged, match="corpus 'train' of run .* was made with source_id='r0' at .*line 1"):
        ingest_set(run, "train", config.corpus, task, "text-classification", folders[0], quiet)


def test_content_sees_order_types_sizes_and_ends_and_no_names(tmp_path: Path) -> None:
    here = tmp_path / "a"
    here.mkdir()
    write_texts(here / "a.jsonl", 3)
    write_texts(here / "b.jsonl", 3, first=5)
    before = content(str(here))
    here.rename(tmp_path / "b")
    assert content(f"{tmp_path}/./b/") == before
    here = tmp_path / "b"
    (here / "b.jsonl").rename(here / "c.jsonl")
    assert content(str(here)) == before
    (here / "c.jsonl").rename(here / "0.jsonl")
    assert content(str(here)) != before, "another order"
    (here / "0.jsonl").rename(here / "c.txt")
    assert content(str(here)) != before, "read as another type"


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


def test_a_tokenizer_is_the_same_one_after_it_was_asked_to_cut_and_to_pad(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    """What it was last asked for is saved beside its vocabulary: a corrected model's tokenizer may have just cut a text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "wrapped")
    tokenizer.save_pretrained(tmp_path / "before")
    tokenizer(["good film", "bad"], truncation=True, max_length=3, padding="max_length")
    tokenizer.save_pretrained(tmp_path / "after")
    before, after = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("before", "after"))
    assert before["truncation"] is before["padding"] is None
    assert after["truncation"]["max_length"] == 3
    assert after["padding"] is not None
    assert tokenizer_fingerprint(tmp_path / "before") == tokenizer_fingerprint(tmp_path / "after")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "grown")
    assert tokenizer_fingerprint(tmp_path / "grown") != tokenizer_fingerprint(tmp_path / "before")
