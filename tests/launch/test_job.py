from pathlib import Path

import pytest

from actors.run_stage import StageStopped
from launch import stage_records
from launch.config import make_config
from launch.job import score
from launch.run import Run
from launch.score import query_command
from launch.stage_records import LeasedJournal
from storage.gradients import StoreMismatch
from storage.journal import Journal
from storage.leases import LeaseLost
from storage.locations import Location
from tests.end_to_end.answers import digests
from tests.end_to_end.conftest import Settings, run_job

HEAD = {"modules": ["classifier"]}


def test_run_again_it_does_nothing_and_says_the_same_label(settings: Settings) -> None:
    config = make_config(settings(gradients=HEAD, output={"label": None}))
    label = score(config, lambda _: None)
    assert label.startswith("tracin-asked-")
    run = Run.open(config.run.uri)
    folders = ("gradients", "states", "scores", "index")
    before = digests(run, *folders)
    assert score(config, lambda _: None) == label
    assert digests(run, *folders) == before


def test_a_label_follows_from_what_changes_the_scores(settings: Settings) -> None:
    labels = [
        score(make_config(settings(gradients=HEAD, output={"label": None}, method=method)), lambda _: None)
        for method in ({"name": "tracin"}, {"name": "tracin", "modules": ["classifier.bias"]}, {"name": "gradient-dot"})
    ]
    assert len(set(labels)) == 3
    assert Run.open(settings()["run"]).labels == sorted(labels)


def test_what_a_job_found_is_said(settings: Settings) -> None:
    said: list[str] = []
    score(make_config(settings(gradients=HEAD | {"coverage": 4})), said.append)
    text = "\n".join(said)
    for part in (
        "train: 45 examples of 45 records",
        "asked: 5 examples",
        "2 parameters looked at",
        "warning: coverage",
    ):
        assert part in text


def test_a_method_that_needs_what_is_not_there_is_refused_at_once(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method.checkpoint=3 is not there: 3 checkpoints"):
        score(make_config(settings(method={"name": "gradient-dot", "checkpoint": 3})), lambda _: None)
    with pytest.raises(ValueError, match="gradients.norms=False is not allowed with method gradient-cosine"):
        score(make_config(settings(method="gradient-cosine", gradients={"norms": False})), lambda _: None)
    assert not Location(str(tmp_path / "run")).exists("manifest.json")


def test_a_pattern_that_matches_nothing_is_the_users_mistake(settings: Settings) -> None:
    with pytest.raises(StageStopped, match="gradients.modules='head' matches no parameter") as stopped:
        score(make_config(settings(gradients={"modules": ["head"]})), lambda _: None)
    assert stopped.value.detail == ""
    run_job(settings(gradients=HEAD))


def test_another_projection_needs_another_run(settings: Settings) -> None:
    run_job(settings(gradients=HEAD))
    with pytest.raises(StoreMismatch, match=r'gradients.projection="two-sided", this run has "gaussian"'):
        run_job(settings(gradients=HEAD | {"projection": "gaussian"}, output={"label": "other"}))


def test_blocks_go_once_the_index_stands(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(settings(gradients=HEAD | {"store": False}))
    run = Location(config.run.uri)
    with monkeypatch.context() as patch:
        patch.setattr(stage_records, "build_index", lambda _: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            score(config, lambda _: None)
    assert len(run.list("scores/scores/blocks")) == 9
    score(config, lambda _: None)
    assert not run.list("scores/scores/blocks")
    before = digests(Run.open(config.run.uri), "scores", "index")
    score(config, lambda _: None)
    assert digests(Run.open(config.run.uri), "scores", "index") == before


def test_the_closing_hint_names_the_scores_where_there_are_several(settings: Settings) -> None:
    made = settings(gradients=HEAD)
    score(make_config(made), lambda _: None)
    command = f"python launch/query.py {made['run']} --query 0"
    assert query_command(made["run"], "scores") == command
    score(make_config(made | {"output": {"label": "other"}}), lambda _: None)
    assert query_command(made["run"], "other") == f"{command} --scores other"


class Lost:
    def check(self) -> None:
        raise LeaseLost("taken over")


def test_a_driver_that_lost_its_run_commits_nothing(tmp_path: Path) -> None:
    journal = Journal(Location(str(tmp_path)), "collect")
    with pytest.raises(LeaseLost, match="taken over"):
        LeasedJournal(journal, Lost()).commit("u0", {"rows": 1})  # type: ignore[arg-type]
    assert not journal.done()


def test_learning_rates_that_are_all_zero_are_refused(settings: Settings, inputs: Path) -> None:
    listed = [{"path": str(inputs / "model" / "checkpoint-10"), "learning_rate": 0}]
    with pytest.raises(ValueError, match="all learning rates are 0"):
        score(make_config(settings(checkpoints=listed)), lambda _: None)


def test_a_neighbour_index_without_a_store_is_refused_at_once(settings: Settings) -> None:
    config = make_config(settings(gradients={"store": False}, output={"neighbours": "ivf"}))
    with pytest.raises(ValueError, match="output.neighbours=ivf needs rows"):
        score(config, lambda _: None)
