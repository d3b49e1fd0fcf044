"""An erased example is in no answer any more; after compaction nothing of it is left in the run's bytes."""

from pathlib import Path

import numpy as np
import pytest

from actors import compaction
from launch import erase as erase_command
from launch.config import make_config
from launch.job import score
from launch.run import Run
from launch.service.catalog import Catalog, RunView
from storage.corpus import Corpus
from storage.gradients import ERASED, GradientStore
from storage.index import ScoreIndex
from storage.leases import RunLease
from storage.verify import verify
from tests.end_to_end.answers import dense
from tests.end_to_end.conftest import Settings, run_job, sentence

GONE = [3, 17, 40]


def erase(run: Run, tmp_path: Path, ids: list[int]) -> int:
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in ids))
    return erase_command.erase(run.location, str(tmp_path / "ids.txt"), None)


def compact(run: Run) -> list[str]:
    said: list[str] = []
    with RunLease(run.location) as lease:
        compaction.compact(run.location, lease.check, said.append)
    return said


def view_of(run: Run) -> RunView:
    """Return the run as a service sees it."""
    catalog = Catalog([run.location.uri])
    return catalog.run(catalog.names[0])


def answers(run: Run, k: int = 45) -> dict[str, list[int]]:
    """Return the ids in every kind of answer."""
    index = run.index()
    view = view_of(run)
    new = run.score(["the film was dull"], k=k)[0]
    return {
        "top": run.top(1, k=k)["id"].to_pylist(),
        "new text": [row["id"] for row in new.proponents + new.opponents],
        "table": [i for batch in index.table("by_example", ["id"]) for i in batch.column(0).to_pylist()],
        "service": [row["id"] for row in view.influences("scores", 1, k)],
        "service's list": [row["id"] for row in view.examples("scores", limit=100).rows],
    }


def test_an_erased_example_leaves_every_answer_at_once(settings: Settings, tmp_path: Path) -> None:
    run = run_job(settings())
    before = answers(run)
    assert all(set(GONE) <= set(ids) for ids in before.values())
    assert erase(run, tmp_path, GONE) == 3
    assert erase(run, tmp_path, GONE) == 0
    after = answers(run)
    for kind, ids in after.items():
        assert ids == [i for i in before[kind] if i not in GONE], kind
    with pytest.raises(ValueError, match="no example 17"):
        run.index().example(17)
    with pytest.raises(ValueError, match="example 3 .* was erased"):
        run.tokens(0, [3]) if hasattr(run.setting().task, "token_losses") else run.corpus(run.index()).row(3)
    counts = view_of(run).histogram("scores")["counts"]
    assert sum(counts) == 42


def test_its_places_are_taken_by_the_next(settings: Settings, tmp_path: Path) -> None:
    run = run_job(settings(output={"top_k": 20}))
    [first] = run.score(["the film was dull"], k=5)
    gone = [row["id"] for row in first.proponents[:2]]
    erase(run, tmp_path, gone)
    [second] = run.score(["the film was dull"], k=5)
    assert [row["id"] for row in second.proponents][:3] == [row["id"] for row in first.proponents][2:]
    assert len(second.proponents) == 5


@pytest.mark.parametrize("kind", ["ivf", "sqfp16"])
def test_a_neighbour_index_leaves_it_out(settings: Settings, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("faiss")
    run = run_job(settings(output={"neighbours": kind}))
    [first] = run.score(["the film was dull"], k=4)
    gone = [row["id"] for row in first.proponents[:2]]
    erase(run, tmp_path, gone)
    [second] = run.score(["the film was dull"], k=4)
    assert [row["id"] for row in second.proponents][:2] == [row["id"] for row in first.proponents][2:]
    assert len(second.proponents) == 4
    compact(run)
    assert not [key for key in run.location.list("index") if ".faiss" in key]
    assert run.score(["the film was dull"], k=4)[0].search == "exact"
    run_job(settings(output={"neighbours": kind}))
    assert not verify(run.location).damages


def test_by_the_corpus_own_ids(settings: Settings, tmp_path: Path) -> None:
    run = run_job(settings())
    (tmp_path / "own.txt").write_text("r5\nr6\n\n")
    assert erase_command.erase(run.location, None, str(tmp_path / "own.txt")) == 2
    assert Corpus.open(run.location, "train").erased() == {5, 6}
    (tmp_path / "own.txt").write_text("r5\nnobody\n")
    with pytest.raises(ValueError, match="no example with source id 'nobody'"):
        erase_command.erase(run.location, None, str(tmp_path / "own.txt"))
    (tmp_path / "ids.txt").write_text("7\nr8\n")
    with pytest.raises(ValueError, match="'r8' in .* is no id of the run"):
        erase_command.erase(run.location, str(tmp_path / "ids.txt"), None)


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compaction_leaves_nothing_of_it(settings: Settings, tmp_path: Path, store: bool, dtype: str) -> None:
    config = settings(gradients={"store": store, "dtype": dtype})
    run = run_job(config)
    before, texts = dense(run), [sentence(i) for i in GONE]
    erase(run, tmp_path, GONE)
    said = compact(run)
    assert "segment 000000.0: 3 of 45 examples blanked, now 000000.1" in said
    corpus = Corpus.open(run.location, "train")
    assert [s.name for s in corpus.segments] == ["000000.1"]
    rows = corpus.read(corpus.segments[0], 0, 45)
    assert [row["id"] for row in rows] == list(range(45))
    assert {rows[i]["text"] for i in GONE} == {""}
    assert all(rows[i]["input_ids"] is None for i in GONE)
    assert not [key for key in run.location.list() if "000000.0" in key and "/asked/" not in key]
    assert np.isnan(dense(run)[GONE]).all()
    others = np.setdiff1d(np.arange(45), GONE)
    np.testing.assert_array_equal(dense(run)[others], before[others])
    if store:
        block = GradientStore.open(run.location).read("train", "checkpoint-20", "000000.1", 0, 45)
        assert np.flatnonzero(block.state == ERASED).tolist() == GONE
        assert all(np.isnan(array[GONE]).all() for array in block.rows.values())
        assert not np.isnan(block.rows["rows"][others]).any()
    left = [
        key
        for key in run.location.list()
        if any(t.encode() in run.location.read(key) for t in texts if t.count(" ") > 5)
    ]
    assert not [key for key in left if "index/" in key or "corpus/train" in key]
    assert not verify(run.location).damages
    assert compact(run) == ["0 objects deleted"]
    run_job(config)  # resumes: all is done
    other = settings(gradients={"store": store, "dtype": dtype}, output={"label": "other"})
    score(make_config(other), lambda _: None)
    again = dense(run, "other")
    np.testing.assert_allclose(again[others], before[others], atol=0 if store else 2e-6)  # without, in other batches
    assert np.isnan(again[GONE]).all()


class Killed(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("step", ["blank_scores", "blank_segment", "rebuild_index", "delete_old_generations"])
def test_a_killed_compaction_goes_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run = run_job(settings())
    erase(run, tmp_path, GONE)

    def dying(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compaction, step, dying)
        compact(run)
    compact(run)
    assert not [key for key in run.location.list() if "000000.0" in key and "/asked/" not in key]
    assert not verify(run.location).damages
    assert set(GONE).isdisjoint(run.top(1, k=45)["id"].to_pylist())
    assert len(next(iter(ScoreIndex.open(run.location, "scores").table("by_example")))) == 42


def test_a_new_checkpoint_is_collected_without_it(settings: Settings, tmp_path: Path, inputs: Path) -> None:
    paths = [{"path": str(inputs / "model" / f"checkpoint-{s}"), "learning_rate": 0.1} for s in (10, 20)]
    run = run_job(settings(checkpoints={"path": paths[:1]}))
    erase(run, tmp_path, GONE)
    compact(run)
    score(make_config(settings(checkpoints={"path": paths}, output={"label": "two"})), lambda _: None)
    block = GradientStore.open(run.location).read("train", "checkpoint-20", "000000.1", 0, 45)
    assert np.flatnonzero(block.state == ERASED).tolist() == GONE
