"""Scores that cannot answer a new query at once say how long a job takes, and start it when asked to."""

from pathlib import Path

import pytest

from actors import worker
from launch.later import job_id, predicted_seconds
from launch.query import answer
from launch.run import Run
from storage.journal import Journal
from storage.locations import Location
from tests.end_to_end.conftest import Settings, run_job


def test_a_new_text_is_answered_by_a_job_when_asked_to(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"modules": ["classifier"]}
    run = run_job(settings(gradients=head | {"dtype": "float32"}, output={"label": "first"}))
    run = run_job(settings(gradients=head | {"store": False}, output={"label": "offline"}))
    with pytest.raises(
        ValueError, match=r"offline cannot answer a new query at once: .*, up to .* s on one worker .* --yes"
    ):
        answer(run, None, "the film was dull", "1", scores="offline")
    found = answer(run, None, "the film was dull", "1", scores="offline", yes=True)
    truth = answer(run, None, "the film was dull", "1", scores="first")
    assert found["query"]["label"] == truth["query"]["label"] == 1
    for side in ("proponents", "opponents"):
        assert [row["id"] for row in found[side]] == [row["id"] for row in truth[side]]
        close = pytest.approx([row["score"] for row in truth[side]], rel=1e-4)
        assert [row["score"] for row in found[side]] == close
        assert found[side][0]["snippet"] == truth[side][0]["snippet"]
    for function in list(worker.UNIT_FUNCTIONS):
        monkeypatch.setitem(worker.UNIT_FUNCTIONS, function, None)
    assert answer(run, None, "the film was dull", "1", scores="offline", yes=True) == found
    assert len(run.location.list("jobs")) > 0


def test_the_prediction_counts_one_block_of_a_solve(tmp_path: Path) -> None:
    run = Location(str(tmp_path))
    assert predicted_seconds(run, "scores") is None
    noted = {
        "prepare-scores": {"c": 1.0}, "solve-scores": {"largest": 10.0, "block-000000": 5.0, "block-000016": 6.0, "state": 0},
        "lissa-scores": {"block-000000-000": 2.0, "block-000000-001": 3.0, "block-000016-000": 4.0},
        "compute-scores": {"a": 20.0, "b": 20.0}, "score-scores": {"a": 0.5}, "compute-other": {"a": 1e6},
    }  # fmt: skip
    for stage, units in noted.items():
        for unit, seconds in units.items():
            Journal(run, stage).commit(unit, {"seconds": seconds} if seconds else {"objects": []})
    assert predicted_seconds(run, "scores") == 1 + 15 + 5 + 40 + 0.5


def test_a_job_is_known_by_what_is_asked() -> None:
    assert job_id("a", [{"text": "x"}]) == job_id("a", [{"text": "x"}])
    assert len({job_id("a", [{"text": "x"}]), job_id("b", [{"text": "x"}]), job_id("a", [{"text": "y"}])}) == 3


def test_a_solve_says_its_time(settings: Settings) -> None:
    method = {"name": "influence", "max_iterations": 2, "rows": 6, "query_block": 2}
    whole = {"modules": ["classifier"], "projection": "none", "store": False}
    run: Run = run_job(settings(gradients=whole, method=method))
    records = Journal(run.location, "solve-scores").done()
    assert records["largest"]["seconds"] > 0
    assert records["block-000004"]["seconds"] > 0
    least = records["largest"]["seconds"] + records["block-000000"]["seconds"]
    predicted = predicted_seconds(run.location, "scores")
    assert predicted is not None
    assert least < predicted < least + 60
