"""FastIF: with all examples as candidates it is influence, with fewer it reads only these."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from actors import candidates as candidates_
from actors import worker
from actors.candidates import search_nearest
from actors.score import load_scores
from engine.methods.nearest import estimated_recall
from launch.run import Run
from tests.end_to_end.answers import digests
from tests.end_to_end.conftest import QUERIES, ROWS, Settings, Told, run_job, sentence
from tests.end_to_end.test_influence import ARTEFACTS, WHOLE
from tests.end_to_end.test_same_result import Killed, kill_in

pytest.importorskip("faiss")
LISSA = {"depth": 10, "dtype": "float64", "repetitions": 2}


def fast_job(settings: Settings, method: dict[str, Any] | None = None, **sections: Any) -> Run:
    method = {"name": "fastif", "neighbours": 6, "recall_sample": 10} | LISSA | (method or {})
    return run_job(settings(**{"gradients": WHOLE, "method": method} | sections))


def candidates(run: Run) -> np.ndarray:
    return safetensors.numpy.load(run.location.read("states/scores/candidates.safetensors"))["candidates"]


def scores(run: Run, queries: int = QUERIES) -> np.ndarray:
    """Return every score in id order, NaN where there is none."""
    out = np.full((ROWS, queries), np.nan)
    for key in run.location.list("scores/scores/shards"):
        shard = load_scores(run.location, key)
        out[shard.ids] = shard.dense
    return out


def test_all_neighbours_are_full_influence(settings: Settings, tmp_path: Path) -> None:
    full = run_job(
        settings(run=str(tmp_path / "full"), gradients=WHOLE, method={"name": "influence", "solver": "lissa"} | LISSA)
    )
    every = fast_job(settings, {"neighbours": ROWS})
    assert (scores(every) == scores(full)).all()
    columns = ["side", "rank", "id", "score"]
    assert every.top(2, k=50).select(columns) == full.top(2, k=50).select(columns)
    assert every.index().meta["candidates"]["recall"] == {}  # nothing is left to be missed
    assert every.index().meta["solve"] == full.index().meta["solve"]


def test_candidates_are_the_nearest_and_alone_are_scored(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = worker.UNIT_FUNCTIONS["compute"]

    def watching(context: Any, given: Any, unit: Any) -> Any:
        task = context.task(given["model"])
        collate = task.collate
        monkeypatch.setattr(task, "collate", lambda rows: (read.extend(r["id"] for r in rows), collate(rows))[1])
        receipt = whole(context, given, unit)
        monkeypatch.setattr(task, "collate", collate)
        return receipt

    monkeypatch.setitem(worker.UNIT_FUNCTIONS, "compute", watching)
    run = fast_job(settings, {"recall_sample": 3})
    near, found = candidates(run), scores(run)
    for query in range(QUERIES):
        assert set(np.flatnonzero(~np.isnan(found[:, query]))) == set(near[query])
    probes = safetensors.numpy.load(run.location.read("states/scores/candidates.safetensors"))["probes"]
    assert set(read) == {i for i in {*near.ravel(), *probes.ravel()} if i >= 0}
    assert len(set(read)) < ROWS
    top = run.top(0, k=6).to_pylist()
    assert {row["id"] for row in top} == set(near[0])
    totals = [row for part in run.index().table("by_example", ["id", "total"]) for row in part.to_pylist()]
    assert len(totals) == ROWS
    assert all((row["total"] is None) == (row["id"] not in set(near.ravel())) for row in totals)
    about = run.index().meta["candidates"]
    assert about["count"] == 6
    assert 0 <= about["recall"]["1"] <= 1


def rewritten(settings: Settings, folder: Path, order: list[int], extra: list[dict[str, Any]]) -> str:
    rows = [{"id": f"r{i}", "text": sentence(i), "label": i % 3} for i in order] + extra
    path = folder / f"train-{len(order)}-{order[0]}-{len(extra)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source_ids(run: Run) -> list[list[str]]:
    corpus = run.corpus(run.index())
    return [[corpus.row(int(i))["source_id"] for i in row if i >= 0] for row in candidates(run)]


def test_candidates_follow_the_examples_not_their_places(settings: Settings, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    forward = fast_job(settings, run=str(tmp_path / "a"))
    turned = fast_job(settings, run=str(tmp_path / "b"), corpus=rewritten(settings, tmp_path, order, []))
    assert [set(ids) for ids in source_ids(forward)] == [set(ids) for ids in source_ids(turned)]


def test_a_query_is_not_its_own_candidate_but_its_duplicates_are(settings: Settings, tmp_path: Path) -> None:
    query = {"id": "r1000", "text": sentence(1000), "label": 1000 % 3}
    twins = [query | {"id": "twin-1"}, query | {"id": "twin-2"}, query]
    corpus = rewritten(settings, tmp_path, list(range(ROWS - 3)), twins)
    near = source_ids(fast_job(settings, corpus=corpus))
    assert {"twin-1", "twin-2"} <= set(near[0])
    assert "r1000" not in near[0]
    assert len(near[0]) == 6


MUTANTS: dict[str, tuple[str, Any]] = {
    "the query itself": ("own_ids", lambda train, queries: {}),
    "no duplicates": ("own_ids", lambda train, queries: {0: np.arange(train.rows - 3, train.rows)}),
    "rows for ids": ("search_nearest", lambda shards, vectors, k: np.tile(np.arange(k), (len(vectors), 1))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(settings: Settings, tmp_path: Path, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        if mutant == "rows for ids":
            test_candidates_follow_the_examples_not_their_places(settings, tmp_path)
        else:
            test_a_query_is_not_its_own_candidate_but_its_duplicates_are(settings, tmp_path)


def test_features_that_are_not_finite_are_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = candidates_.read_features

    def spoiled(run: Any, corpus: Any, *given: Any) -> Any:
        for ids, features in whole(run, corpus, *given):
            yield (
                ids,
                np.where(np.arange(len(ids))[:, None] == 1, np.nan, features) if corpus.rows == QUERIES else features,
            )

    monkeypatch.setattr(candidates_, "read_features", spoiled)
    with pytest.raises(FloatingPointError, match=r"features of queries \[1\] are not finite"):
        fast_job(settings)


def test_anchors_share_the_neighbours_of_their_mean(settings: Settings) -> None:
    near = candidates(fast_job(settings, {"anchors": True, "features": "last-hidden"}))
    assert (near == near[0]).all()


def test_workers_and_kills_change_no_bit(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fast_job(settings, run=str(tmp_path / "one"))
    two = fast_job(settings, run=str(tmp_path / "two"), cluster={"workers": 2})
    assert digests(one, *ARTEFACTS, "features") == digests(two, *ARTEFACTS, "features")
    for function, call in (("features", 2), ("lissa", 1), ("compute", 2)):
        with monkeypatch.context() as patch:
            kill_in(function, call, patch)
            with pytest.raises(Killed):
                fast_job(settings)
    assert digests(fast_job(settings), *ARTEFACTS) == digests(one, *ARTEFACTS)


def test_the_search_is_exact_whatever_the_shards() -> None:
    draw = np.random.default_rng(0)
    features, queries = draw.normal(size=(50, 4)).astype(np.float32), draw.normal(size=(3, 4)).astype(np.float32)
    ids = draw.permutation(1000)[:50]
    features[7] = np.nan
    distance = np.square(features[None] - queries[:, None]).sum(2)
    distance[:, 7] = np.inf
    truth = ids[np.argsort(distance, 1)[:, :9]]
    for size in (5, 13, 50):
        shards = ((ids[i : i + size], features[i : i + size]) for i in range(0, 50, size))
        assert (search_nearest(shards, queries, 9) == truth).all()
    wrong = ids[np.argsort(-(queries @ features.T), 1)[:, :9]]  # by inner product
    assert not (wrong == truth).all()


def test_recall_is_estimated_without_bias() -> None:
    draw = np.random.default_rng(1)
    scores_ = draw.normal(size=2000)
    candidate = draw.random(2000) < 0.02 + 0.6 * (np.abs(scores_) > 1.5)
    strongest = np.argsort(-np.abs(scores_))[:100]
    truth = candidate[strongest].mean()
    others = scores_[~candidate]
    own = scores_[candidate]
    found = [estimated_recall(own, draw.choice(others, 200, replace=False), len(others), 100) for _ in range(300)]
    assert abs(np.mean(found) - truth) < 0.03
    assert abs(np.mean([estimated_recall(own, others[:200], 200, 100)]) - truth) > 0.1  # unweighted


@pytest.mark.parametrize(
    ("method", "gradients", "said"),
    [
        ({"neighbours": 0}, {}, "method.neighbours=0 is not allowed: must be a whole number of at least 1"),
        ({"features": "cls"}, {}, "method.features='cls' is not allowed: must be 'pooled' or 'last-hidden'"),
        ({}, {"store": True}, "gradients.store=True is not allowed with method fastif"),
        ({}, {"projection": "two-sided"}, "Set gradients.projection=none and gradients.store=false."),
    ],
)
def test_bad_settings_are_refused(settings: Settings, told: Told, method: dict, gradients: dict, said: str) -> None:
    assert said in told(settings(gradients=WHOLE | gradients, method={"name": "fastif"} | method))
