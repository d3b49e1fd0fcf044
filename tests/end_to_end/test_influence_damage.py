"""What a solve left is named when it is lost or altered, and made anew by running again; large states are read in windows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import states
from actors.run_stage import StageStopped
from launch.config import make_config
from launch.job import score
from launch.run import Run
from storage.damage import DamagedObject
from storage.journal import Journal
from storage.locations import Location
from storage.verify import verify
from tests.end_to_end.answers import dense, digests
from tests.end_to_end.conftest import Settings, run_job
from tests.end_to_end.test_damage import HARMS, Harm, flip
from tests.end_to_end.test_influence import ARTEFACTS, METHOD, WHOLE
from tests.end_to_end.test_same_result import Killed, kill_in

HEAD = WHOLE | {"modules": ["classifier"]}
STORED = {"modules": ["classifier"], "projection": "none", "dtype": "float32"}
FEW = METHOD | {"rows": 6, "max_iterations": 2}
METHODS: dict[str, dict[str, Any]] = {
    "cg": {"gradients": HEAD, "method": FEW},
    "lissa": {"gradients": HEAD, "method": FEW | {"solver": "lissa", "depth": 3, "lissa_scale": 100.0}},
    "sketch": {"gradients": HEAD, "method": FEW | {"solver": "sketch", "columns": 4, "depth": 3, "batch_size": 2}},
    "fastif": {
        "gradients": HEAD,
        "method": {"name": "fastif", "neighbours": 4, "recall_sample": 2, "depth": 3, "repetitions": 2},
    },
    "projected": {"gradients": STORED, "method": METHOD | {"solver": "projected"}},
}
OBJECTS = {
    "state": "states/scores/checkpoint-30.safetensors",
    "figures": "states/scores/figures.json",
    "gradients": "states/scores/gradients/checkpoint-30.safetensors",
    "sketch": "states/scores/sketch/columns-0001.safetensors",
    "gram": "states/scores/gram.safetensors",
}
CANDIDATES = "states/scores/candidates.safetensors"
UNITS = {
    "state": ("solve-scores", "state"), "figures": ("solve-scores", "state"), "gram": ("solve-scores", "gram"),
    "gradients": ("prepare-scores", "checkpoint-30"), "sketch": ("sketch-scores", "columns-0001"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("solver", "what", "harm"),
    [("cg", "state", harm) for harm in HARMS]
    + [(solver, "state", flip) for solver in ("lissa", "sketch", "projected")]
    + [("cg", "figures", flip), ("cg", "gradients", flip), ("sketch", "sketch", flip), ("projected", "gram", flip)],
)
def test_damage_is_named_and_mended_by_running_again(settings: Settings, solver: str, what: str, harm: Harm) -> None:
    run = run_job(settings(**METHODS[solver]))
    before = digests(run, *ARTEFACTS)
    harm(run.location, OBJECTS[what])
    [damage] = verify(run.location).damages
    assert (damage.key, damage.stage, damage.unit) == (OBJECTS[what], *UNITS[what])
    said: list[str] = []
    score(make_config(settings(**METHODS[solver])), said.append)
    assert digests(run, *ARTEFACTS) == before
    assert not verify(run.location).damages


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
def test_a_damaged_state_met_on_the_way_is_mended_by_running_again(settings: Settings, harm: Harm) -> None:
    run = run_job(settings(**METHODS["cg"]))
    before = digests(run, *ARTEFACTS)
    harm(run.location, OBJECTS["state"])
    for stage in ("compute", "score", "index"):
        for noted in run.location.list(f"journal/{stage}-scores"):
            run.location.delete(noted)
    for key in run.location.list("scores"):
        run.location.delete(key)
    with pytest.raises(StageStopped, match=r"of unit state of stage solve-scores\. Run the job .* again"):
        run_job(settings(**METHODS["cg"]))
    assert Journal(run.location, "solve-scores").damaged() == ["block-000000", "block-000003", "state"]
    run_job(settings(**METHODS["cg"]))
    assert digests(run, *ARTEFACTS) == before


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
def test_damaged_gradients_of_queries_met_by_a_solve_are_named_and_made_anew(
    settings: Settings, tmp_path: Path, harm: Harm, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = digests(run_job(settings(run=str(tmp_path / "undisturbed"), **METHODS["cg"])), *ARTEFACTS)
    with monkeypatch.context() as patch:
        kill_in("curvature", 1, patch)
        with pytest.raises(Killed):
            run_job(settings(**METHODS["cg"]))
    harm(Location.parse(settings()["run"]), OBJECTS["gradients"])
    with pytest.raises(DamagedObject, match=r"of unit checkpoint-30 of stage prepare-scores\. Run the job .* again"):
        run_job(settings(**METHODS["cg"]))
    assert digests(run_job(settings(**METHODS["cg"])), *ARTEFACTS) == truth


@pytest.mark.parametrize("harm", HARMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("looked", [True, False], ids=["verified", "met"])
def test_lost_candidates_and_features_are_named_and_made_anew(settings: Settings, harm: Harm, looked: bool) -> None:
    pytest.importorskip("faiss")
    run = run_job(settings(**METHODS["fastif"]))
    before = digests(run, *ARTEFACTS, "features")
    harm(run.location, CANDIDATES)
    if looked:
        [features, *_] = run.location.list("features/train")
        harm(run.location, features)
        found = {damage.key: damage.stage for damage in verify(run.location).damages}
        assert found == {CANDIDATES: "solve-scores", features: next(s for s in found.values() if s != "solve-scores")}
    else:
        with pytest.raises(DamagedObject, match=r"of unit candidates of stage solve-scores\. Run the job .* again"):
            run_job(settings(**METHODS["fastif"]))
    run_job(settings(**METHODS["fastif"]))
    assert digests(run, *ARTEFACTS, "features") == before
    assert not verify(run.location).damages


def windowed(settings: Settings, run: str, most: int, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> Run:
    """Run the job with states read whole only up to `most` bytes."""
    monkeypatch.setattr("actors.context.STATE_BYTES", most)
    return run_job(settings(run=run, **METHODS["cg"] | sections))


@pytest.mark.parametrize("stored", [False, True])
def test_a_state_larger_than_a_worker_holds_is_read_in_windows(
    settings: Settings, tmp_path: Path, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"gradients": STORED} if stored else {}
    whole = windowed(settings, str(tmp_path / "whole"), 1 << 30, monkeypatch, **sections)
    read: list[tuple[int, int]] = []
    window = states.SavedState.window

    def watched(self: Any, first: int, last: int) -> Any:
        read.append((first, last))
        return window(self, first, last)

    monkeypatch.setattr(states.SavedState, "window", watched)
    two_queries = 2 * 27 * 4  # of a head with 27 weights
    narrow = windowed(settings, str(tmp_path / "narrow"), two_queries, monkeypatch, **sections)
    assert {(0, 2), (2, 4), (4, 5)} <= set(read)
    assert np.abs(dense(whole)).max() > 0
    np.testing.assert_allclose(dense(narrow), dense(whole), rtol=1e-4, atol=1e-6 * np.abs(dense(whole)).max())
    assert digests(narrow, "states") == digests(whole, "states")

    monkeypatch.setattr(states.SavedState, "window", lambda self, first, last: window(self, 0, last - first))
    wrong = windowed(settings, str(tmp_path / "wrong"), two_queries, monkeypatch, **sections)
    assert not np.allclose(dense(wrong), dense(whole), rtol=1e-2, atol=1e-6)
