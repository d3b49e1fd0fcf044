"""Turn-over dropout as a job: every score against two plain masked forward passes, standard errors, the same result."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors import turnover as units
from actors.score import load_scores
from engine.turnover import TurnOver, restore
from engine.turnover_scores import Estimator
from launch.config import make_config
from launch.run import Run
from launch.train import train_model
from storage.corpus import Corpus
from tests.conftest import tiny_bert
from tests.end_to_end.answers import collated, dense, digests, self_influence
from tests.end_to_end.conftest import QUERIES, ROWS, Settings, Told, run_job, tiny_job
from tests.end_to_end.test_same_result import Killed, kill_in

ARTEFACTS = ("states", "scores", "index", "corpus")
SEEDS = 3


@pytest.fixture(scope="module")
def trained(inputs: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trainings of adapters and a wide head on the tiny job's corpus, each under masks of its own."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_bert(num_hidden_layers=3).save_pretrained(folder / "base")
    for file in (tokenizer_folder / "wrapped").iterdir():
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    masks = {"adapters": 4, "head": 12, "layers": "top", "seeds": SEEDS, "kind": "hashed", "curves": 0}
    train = {"base": str(folder / "base"), "epochs": 2, "checkpoints": 2, "learning_rate": 0.03, "turnover": masks}
    job = tiny_job(inputs, folder / "run", checkpoints=str(folder / "model"), train=train)
    return train_model(make_config(job), lambda _: None)


@pytest.fixture
def masked(settings: Settings, trained: Path) -> Settings:
    """Make configs of the tiny job that ask these trainings."""
    return lambda **sections: settings(**{"checkpoints": str(trained), "method": "turnover"} | sections)


def oracle(run: Run, against: str = "own") -> tuple[np.ndarray, np.ndarray]:
    """Return float64 scores [R, n, Q] and self-influence [R, n]: every pair by two forward passes of one row."""
    task, train, asked = collated(run)

    def under(turnover: TurnOver, example: int, side: Any, one: Any) -> float:
        turnover.use(torch.tensor([example]), side)
        with torch.no_grad():
            return float(task.loss(turnover.model, one))

    found, own = [], []
    for checkpoint in run.checkpoints():
        folder = Path(checkpoint.uri)
        turnover = restore(task.build(folder).double().eval(), folder)
        scores = np.empty((ROWS, QUERIES))
        for i, j in np.ndindex(ROWS, QUERIES):
            one = asked.take([j])
            base = under(turnover, i, "own", one)
            if against == "full":
                turnover.off()
                base = float(task.loss(turnover.model, one).detach())
            scores[i, j] = under(turnover, i, "flipped", one) - base
        found.append(scores)
        own.append([under(turnover, i, "flipped", train.take([i])) - under(turnover, i, "own", train.take([i]))
                    for i in range(ROWS)])  # fmt: skip
    return np.stack(found), np.array(own)


@pytest.mark.parametrize("against", ["own", "full"])
def test_scores_are_the_mean_over_trainings_of_two_plain_forward_passes(
    masked: Settings, against: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "turnover", "against": against}
    run = run_job(masked(method=method))
    truth, own = oracle(run, against)
    assert np.abs(truth.mean(0)).max() > 1e-3
    np.testing.assert_allclose(dense(run), truth.mean(0), rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(self_influence(run), own.mean(0), rtol=1e-4, atol=2e-6)

    plain = Estimator.losses
    other = ("flipped", "own") if against == "own" else ("own",)
    mutants = {
        "flip": lambda self, ids, queries, _, rows: plain(self, ids, queries, other, rows),
        "id": lambda self, ids, *rest: plain(self, ids + 1, *rest),
    }
    for name, mutant in mutants.items():
        with monkeypatch.context() as patch:
            patch.setattr(Estimator, "losses", mutant)
            wrong = dense(run_job(masked(run=run.location.uri + name, method=method)))
        assert np.abs(wrong - truth.mean(0)).max() > 1e-3


def test_standard_errors_stand_beside_the_index(masked: Settings) -> None:
    run = run_job(masked(output={"top_k": 7}))
    truth, own = oracle(run)
    error = truth.std(0, ddof=1) / np.sqrt(SEEDS)
    for row in run.top(2, k=7).to_pylist():
        assert row["score"] == pytest.approx(truth.mean(0)[row["id"], 2], rel=1e-4, abs=2e-6)
        assert row["standard_error"] == pytest.approx(error[row["id"], 2], rel=1e-3, abs=2e-6)
    examples = [row for batch in run.index().table("by_example") for row in batch.to_pylist()]
    totals = truth.sum(2)
    for name, sample in (("total", totals), ("self_influence", own)):
        expected = sample.std(0, ddof=1) / np.sqrt(SEEDS)
        np.testing.assert_allclose([e[f"{name}_standard_error"] for e in examples], expected, rtol=1e-3, atol=2e-6)
        np.testing.assert_allclose([e[name] for e in examples], sample.mean(0), rtol=1e-4, atol=1e-5)
    meta = run.index().meta
    assert (meta["score_unit"], meta["mask_seeds"]) == ("sub_network_loss", SEEDS)


def test_one_training_has_no_standard_error(masked: Settings, trained: Path) -> None:
    run = run_job(masked(checkpoints=str(trained / "seed-1")))
    assert len(run.checkpoints()) == 1
    assert "standard_error" not in run.top(0).column_names
    first = load_scores(run.location, run.location.list("scores/scores/shards")[0])
    assert first.errors is None
    truth, _ = oracle(run)
    np.testing.assert_allclose(dense(run), truth[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_bit(masked: Settings, tmp_path: Path, workers: int) -> None:
    one = run_job(masked())
    many = run_job(masked(run=str(tmp_path / "many"), cluster={"workers": workers}))
    assert digests(one, *ARTEFACTS) == digests(many, *ARTEFACTS)


@pytest.mark.parametrize(("function", "call"), [("prepare", 2), ("turnover", 4), ("score", 2)])
def test_a_killed_job_resumes_to_the_same_bits(
    masked: Settings, tmp_path: Path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(masked(run=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        kill_in(function, call, patch)
        with pytest.raises(Killed):
            run_job(masked())
    assert digests(run_job(masked()), *ARTEFACTS) == digests(whole, *ARTEFACTS)


@pytest.mark.parametrize("g", [{"shard_rows": 7}, {"shard_rows": 64}, {"token_budget": 1}, {"token_budget": 4000}])
def test_shard_and_batch_sizes_change_scores_by_rounding_only(masked: Settings, g: dict[str, Any]) -> None:
    run = run_job(masked(gradients=g))
    np.testing.assert_allclose(dense(run), oracle(run)[0].mean(0), rtol=1e-4, atol=2e-6)


def test_lower_layers_run_once_a_query_and_unit(masked: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters in the top layer of three: what the second layer computes does not grow with the number of masks."""
    seen = {f"encoder.layer.{layer}.intermediate.dense": 0 for layer in (1, 2)}
    begin = Estimator.losses

    def watched(self: Estimator, *given: Any) -> Any:
        handles = [
            self.turnover.model.get_submodule(f"bert.{name}").register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, seen[name] + len(args[0]))
            )
            for name in seen
        ]
        try:
            return begin(self, *given)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(Estimator, "losses", watched)
    run_job(masked(gradients={"token_budget": 4000}))
    below, above = seen.values()
    assert above >= SEEDS * 2 * ROWS * QUERIES
    assert below < above / 5


def test_another_label_of_the_query_is_another_target(masked: Settings, inputs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (inputs / "queries.jsonl").read_text().splitlines()]
    other = tmp_path / "others.jsonl"
    other.write_text("".join(json.dumps(row | {"label": (row["label"] + 1) % 3}) + "\n" for row in rows))
    run = run_job(masked(queries={"name": "asked", "path": str(other)}))
    np.testing.assert_allclose(dense(run), oracle(run)[0].mean(0), rtol=1e-4, atol=2e-6)


def test_checkpoints_without_masks_or_with_the_same_are_refused(
    masked: Settings, told: Told, inputs: Path, trained: Path
) -> None:
    assert "checkpoint-30 has no turnover.json: it was not trained with turn-over dropout. Train it with" in told(
        masked(checkpoints=str(inputs / "model"))
    )
    both = sorted(str(path) for path in (trained / "seed-0").glob("checkpoint-*"))
    assert "have the same masks: scores are averaged over trainings under other masks" in told(
        masked(checkpoints={"path": both})
    )


def test_what_it_cannot_do_is_refused(masked: Settings, told: Told) -> None:
    assert "output.neighbours=ivf is not allowed with method turnover" in told(masked(output={"neighbours": "ivf"}))
    run = run_job(masked())
    with pytest.raises(ValueError, match="cannot answer a new text at once"):
        run.score(["the film was dull"])


def test_another_corpus_than_the_trained_one_is_warned_of(masked: Settings, inputs: Path, tmp_path: Path) -> None:
    from launch.job import score

    lines = (inputs / "train.jsonl").read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)))
    said: list[str] = []
    score(make_config(masked(corpus=str(tmp_path / "turned.jsonl"))), said.append)
    assert sum("was trained on another corpus than" in line for line in said) == SEEDS
    said.clear()
    score(make_config(masked(run=str(tmp_path / "again"))), said.append)
    assert not any("warning" in line for line in said)


def test_a_loss_that_is_not_finite_sets_its_example_aside(masked: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = units.masked_losses

    def spoiled(context: Any, settings: Any, at: Any, ids: np.ndarray, sides: Any) -> Any:
        found = plain(context, settings, at, ids, sides)
        found["flipped"][ids == 20] = np.inf
        return found

    monkeypatch.setattr(units, "masked_losses", spoiled)
    run = run_job(masked(cluster={"max_bad_fraction": 0.5}))
    assert run.index().example(20)["quarantined"]
    assert np.isnan(dense(run)[20]).all()


def test_erased_examples_have_no_score(masked: Settings) -> None:
    run = run_job(masked())
    whole = dense(run)
    Corpus.open(run.location, "train").erase([3, 20])
    after = dense(run_job(masked(output={"label": "after"})), "after")
    kept = np.setdiff1d(np.arange(ROWS), [3, 20])
    np.testing.assert_allclose(after[kept], whole[kept], rtol=1e-5, atol=1e-6)
    assert np.isnan(after[[3, 20]]).all()
