"""What 'the same result' means: bitwise whatever the workers, order and interruptions; within 1e-5 ‖g‖‖g′‖ otherwise."""

import shutil

import numpy as np
import pytest
from scipy import stats

from actors import worker
from launch.config import make_config
from launch.job import score
from launch.run import Run
from storage.gradients import GradientStore, MissingRows
from tests.end_to_end.answers import dense, digests, oracle_scores
from tests.end_to_end.conftest import Settings, run_job

ARTEFACTS = ("gradients", "states", "scores", "index", "corpus")


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_bit(settings: Settings, tmp_path, workers: int) -> None:
    one = run_job(settings())
    many = run_job(settings(run=str(tmp_path / "many"), cluster={"workers": workers}))
    assert digests(one, *ARTEFACTS) == digests(many, *ARTEFACTS)


class Killed(KeyboardInterrupt):
    """Stands for the end of the process in the middle of a unit."""


def kill_in(function: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end in the given call of a unit function, after its objects are written, before it is noted."""
    left = [call]
    whole = worker.UNIT_FUNCTIONS[function]

    def dying(context, settings, unit):
        receipt = whole(context, settings, unit)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return receipt

    monkeypatch.setitem(worker.UNIT_FUNCTIONS, function, dying)


@pytest.mark.parametrize(("function", "call"), [("collect", 5), ("prepare", 2), ("score", 2), ("inspect", 1)])
def test_a_killed_job_resumes_to_the_same_bits(
    settings: Settings, tmp_path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(settings(run=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        kill_in(function, call, patch)
        with pytest.raises(Killed):
            run_job(settings())
    again = run_job(settings())
    assert digests(whole, *ARTEFACTS) == digests(again, *ARTEFACTS)


def test_running_again_computes_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(run_job(settings()), *ARTEFACTS, "journal/collect-train")
    for function in list(worker.UNIT_FUNCTIONS):
        monkeypatch.setitem(worker.UNIT_FUNCTIONS, function, None)  # a call would fail
    after = digests(run_job(settings()), *ARTEFACTS, "journal/collect-train")
    assert before == after


@pytest.mark.parametrize("g", [{"shard_rows": 7}, {"shard_rows": 45}, {"token_budget": 1}, {"token_budget": 400}])
@pytest.mark.parametrize("store", [True, False])
def test_shard_and_batch_sizes_change_scores_by_rounding_only(settings: Settings, inputs, g: dict, store: bool) -> None:
    run = run_job(settings(gradients={"projection": "none", "store": False}))
    exact, _, bound = oracle_scores(run, inputs / "model")
    assert (np.abs(dense(run) - exact) <= 1e-5 * bound).all()
    if store:
        g = g | {"projection": "none", "modules": ["classifier"], "dtype": "float32"}
    else:
        g = g | {"projection": "none", "store": False}
    other = run_job(settings(run=run.location.uri + "-other", gradients=g))
    names = ["classifier.weight", "classifier.bias"] if store else None
    exact, _, bound = oracle_scores(other, inputs / "model", names)
    assert (np.abs(dense(other) - exact) <= 1e-5 * bound).all()


def test_stored_float16_rows_rank_as_float32(settings: Settings) -> None:
    half = dense(run_job(settings()))
    full = dense(run_job(settings(run=settings()["run"] + "-full", gradients={"dtype": "float32"})))
    for query in range(half.shape[1]):
        assert stats.spearmanr(half[:, query], full[:, query]).statistic >= 0.999


def test_bfloat16_compute_and_eager_attention_are_near(settings: Settings) -> None:
    base = dense(run_job(settings()))
    eager = dense(run_job(settings(run=settings()["run"] + "-eager", gradients={"attention": "eager"})))
    assert np.abs(eager - base).max() <= 2e-3 * np.abs(base).max()  # rows are kept in float16
    rough = dense(run_job(settings(run=settings()["run"] + "-bf16", gradients={"compute": "bfloat16"})))
    assert np.corrcoef(rough.ravel(), base.ravel())[0, 1] > 0.995


def test_another_runs_store_serves_new_queries(settings: Settings, inputs, tmp_path) -> None:
    own = run_job(settings())
    run = {"uri": str(tmp_path / "second"), "store": own.location.uri}
    other = run_job(settings(run=run))
    assert not other.location.list("gradients")
    assert (dense(own) == dense(other)).all()
    assert own.top(1).select(["id", "score"]) == other.top(1).select(["id", "score"])
    assert other.score(["the film was dull"], k=2)[0] == own.score(["the film was dull"], k=2)[0]


def test_a_store_of_other_weights_is_refused(settings: Settings, inputs, tmp_path) -> None:
    own = run_job(settings())
    run = {"uri": str(tmp_path / "second"), "store": own.location.uri}
    shutil.copytree(inputs / "model", tmp_path / "model")
    shutil.copy(inputs / "model/checkpoint-30/model.safetensors", tmp_path / "model/checkpoint-20/model.safetensors")
    with pytest.raises(ValueError, match="has no rows of checkpoint checkpoint-20 as it is here"):
        score(make_config(settings(run=run, checkpoints=str(tmp_path / "model"))), lambda _: None)


def test_a_lost_shard_is_named_and_never_read_as_zero(settings: Settings) -> None:
    run = run_job(settings())
    store = GradientStore.open(run.location)
    key = next(k for k in run.location.list("gradients/train") if "/state/c/" in k)
    run.location.delete(key)
    checkpoint, segment = key.split("/")[2:4]
    with pytest.raises(MissingRows, match=r"rows 0:16"):
        store.read("train", checkpoint, segment, 0, 16)


@pytest.mark.parametrize("kind", ["ivf", "sqfp16"])
@pytest.mark.parametrize("method", ["tracin", "gradient-cosine"])
def test_a_neighbour_index_answers_as_the_scan_does(settings: Settings, kind: str, method: str) -> None:
    pytest.importorskip("faiss")
    said: list[str] = []
    made = make_config(settings(output={"neighbours": kind}, method={"name": method}))
    score(made, said.append)
    assert any(f"{kind} index of 45 rows" in line and "recall@" in line for line in said)
    run = Run.open(settings()["run"])
    near = run.score(["the film was very dull"], k=5)[0]
    scan = run.score(["the film was very dull"], k=5, exact=True)[0]
    for side in ("proponents", "opponents"):
        a, b = getattr(near, side), getattr(scan, side)
        assert len({r["id"] for r in a} & {r["id"] for r in b}) >= 4
        np.testing.assert_allclose([r["score"] for r in a], [r["score"] for r in b], rtol=2e-2)
