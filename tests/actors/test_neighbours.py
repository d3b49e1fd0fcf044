"""Neighbour indices of a run: built with their recall, asked by default only if the last job wished it."""

import json
from pathlib import Path

import pytest

from actors.neighbours import about_search, chosen_search, described
from launch.config import make_config
from launch.job import score
from launch.query import answer
from launch.run import Run
from tests.end_to_end.conftest import inputs, tiny_job

__all__ = ["inputs"]
HEAD = {"modules": ["classifier"]}
TEXT = "the film was dull"


@pytest.fixture(scope="module")
def job(inputs: Path, tmp_path_factory: pytest.TempPathFactory):
    """Run the same scores again under another `output.neighbours`, and return the run and what was said."""
    place = tmp_path_factory.mktemp("neighbours") / "run"

    def again(kind: str) -> tuple[Run, str]:
        said: list[str] = []
        config = tiny_job(inputs, place, gradients=HEAD, output={"label": "scores", "top_k": 9, "neighbours": kind})
        score(make_config(config), said.append)
        return Run.open(str(place)), "\n".join(said)

    return again


def test_the_last_job_says_what_answers(job) -> None:
    run, _ = job("exact")
    assert chosen_search(run.location, "scores") == "exact"
    plain = answer(run, None, TEXT, "1", 3)
    assert plain["search"] == "exact"
    assert "recall" not in plain
    for kind in ("ivf", "sqfp16", "ivf"):
        run, _ = job(kind)
        found = answer(run, None, TEXT, "1", 3)
        assert found["search"] == run.score([TEXT], [1], 3)[0].search == kind
        assert set(found["recall"]) == {"proponents", "opponents"}
        assert answer(run, None, TEXT, "1", 3, exact=True) == plain
        assert answer(run, "0", top=3)["search"] == "exact"  # a stored answer
    run, _ = job("exact")
    assert answer(run, None, TEXT, "1", 3) == plain  # the indices that are there do not answer unasked
    run, _ = job("exact")
    assert len([k for k in run.location.list("index/scores") if "search." in k]) == 4  # not one more for the same wish


def test_recall_is_measured_on_both_sides_and_kept(job) -> None:
    run, _ = job("ivf")
    about = about_search(run.location, "scores", "ivf")
    assert about is not None
    assert (about["rows"], about["k"], about["queries"]) == (45, 9, 5)
    assert set(about["recall"]) == {"proponents", "opponents"}
    assert min(about["recall"].values()) >= 0.95
    assert about["lists"]["searched"] <= about["lists"]["of"]
    json.dumps(about)
    assert about_search(run.location, "scores", "exact") is None


def test_an_index_that_a_killed_job_left_without_its_record_is_built_again(job) -> None:
    run, _ = job("sqfp16")
    run.location.delete("index/scores/neighbours-sqfp16.json")
    run, said = job("sqfp16")
    assert "sqfp16 index of 45 rows" in said
    assert answer(run, None, TEXT, "1", 3)["search"] == "sqfp16"


def test_low_recall_is_said() -> None:
    about = {"search": "ivf", "rows": 9, "columns": 4, "queries": 2, "k": 5, "lists": {"searched": 3, "of": 3}}
    low = described(about | {"recall": {"proponents": 0.99, "opponents": 0.5}})
    assert "0.990 of proponents, 0.500 of opponents" in low
    assert "below 0.95: output.neighbours=exact misses none" in low
    assert "below" not in described(about | {"recall": {"proponents": 0.99, "opponents": 0.95}})
