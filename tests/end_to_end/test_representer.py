"""Representer points as a job: scores against a head solved by Newton's method, logits as their sums, the same result."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import actors.representer
from launch.compare import compare
from launch.config import make_config
from launch.query import answer, show
from launch.run import Run
from storage.corpus import Corpus
from tests.end_to_end.answers import collated, dense, digests, self_influence
from tests.end_to_end.conftest import Settings, Told, run_job
from tests.end_to_end.test_same_result import Killed, kill_in

ARTEFACTS = ("features", "states", "scores", "index", "corpus")
PENALTY = 0.01
METHOD = {"name": "representer", "penalty": PENALTY}


def newton(features: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Return the head at which the gradient of (1/n) Σ ℓ + λ‖W‖² is 0, from the whole Hessian."""

    def objective(w: Tensor) -> Tensor:
        logits = features @ w.view(classes, -1).T
        return torch.nn.functional.cross_entropy(logits, labels) + penalty * w.square().sum()

    w = torch.zeros(classes * features.shape[1], dtype=torch.float64)
    for _ in range(30):
        w = w - torch.linalg.solve(torch.autograd.functional.hessian(objective, w), torch.func.grad(objective)(w))
    assert float(torch.func.grad(objective)(w).norm()) < 1e-14
    return w.view(classes, -1)


def oracle(run: Run) -> dict[str, Tensor]:
    """Return features of both sides, the head and α by its definition, from the last checkpoint's pooled output."""
    task, train, asked = collated(run)
    model = task.build(Path(run.checkpoints()[-1].uri)).eval()
    with torch.no_grad():
        f, q = (model.bert(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).pooler_output.double()
                for b in (train, asked))  # fmt: skip
    labels = train["target"]
    head = newton(f, labels, 3, PENALTY)
    wrong = torch.softmax(f @ head.T, 1) - torch.nn.functional.one_hot(labels, 3)
    return {"f": f, "q": q, "head": head, "alpha": -wrong / (2 * PENALTY * len(f)), "labels": labels,
            "asked": asked["target"]}  # fmt: skip


def test_scores_equal_their_definition_and_sum_to_the_logits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_job(settings(method=METHOD))
    o = oracle(run)
    truth = (o["alpha"][:, o["asked"]] * (o["f"] @ o["q"].T)).numpy()
    np.testing.assert_allclose(dense(run), truth, rtol=1e-4, atol=1e-5)
    logits = (o["q"] @ o["head"].T).gather(1, o["asked"][:, None])[:, 0].numpy()
    np.testing.assert_allclose(dense(run).sum(0), logits, rtol=1e-4, atol=1e-5)
    own = o["alpha"].gather(1, o["labels"][:, None])[:, 0] * o["f"].square().sum(1)
    np.testing.assert_allclose(self_influence(run), own.numpy(), rtol=1e-4)

    right = actors.representer.coefficients
    for name, mutant in {
        "sign": lambda *given: -right(*given),
        "2": lambda *given: 2 * right(*given),
        "distilled": lambda head, f, y: right(head, f, (f.double() @ head.weights.T).argmax(1)),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(actors.representer, "coefficients", mutant)
            wrong = dense(run_job(settings(method=METHOD, run=f"{run.location.uri}-{name}")))
        assert np.abs(wrong - truth).max() > 0.01 * np.abs(truth).max()


def test_the_sum_gives_the_logit_to_1e_8_in_float64(settings: Settings) -> None:
    """Scores are stored in float32 at most; the state, the head and the coefficients are exact."""
    run = run_job(settings(method=METHOD))
    head = run.location.read_json("states/scores/head.json")
    assert head["gradient_norm"] <= 1e-10
    assert head["error"] == pytest.approx(head["gradient_norm"] / (2 * PENALTY))
    examples = [row for batch in run.index().table("by_example") for row in batch.to_pylist()]
    o = oracle(run)
    weights, _ = actors.representer.WorkerContext(run.location.uri).head("scores")
    assert torch.allclose(weights, o["head"], atol=1e-6)  # from features of float32
    logits = o["q"].float().double() @ weights.T
    total = sum(row["total"] for row in examples)
    assert total == pytest.approx(float(logits.gather(1, o["asked"][:, None]).sum()), rel=1e-6)


def test_the_predicted_class_is_the_retrained_heads(settings: Settings) -> None:
    run = run_job(settings(method=METHOD | {"logit": "predicted"}))
    o = oracle(run)
    classes = (o["q"] @ o["head"].T).argmax(1)
    assert (classes != o["asked"]).any()
    truth = (o["alpha"][:, classes] * (o["f"] @ o["q"].T)).numpy()
    np.testing.assert_allclose(dense(run), truth, rtol=1e-4, atol=1e-5)


def test_its_scores_say_that_they_are_logits(settings: Settings) -> None:
    meta = run_job(settings(method=METHOD)).index().meta
    assert meta["score_unit"] == "logit"
    assert meta["sign"].startswith("positive: the example raises the logit of the query's own class; no loss")
    assert meta["head"]["penalty"] == PENALTY


def test_logits_are_never_compared_with_losses_and_are_called_so(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_job(settings(method=METHOD))
    other = run_job(settings(method="gradient-dot", output={"label": "dots"}))
    with pytest.raises(
        ValueError, match="scores scores are in units of logit, scores dots of dot: what raises a logit"
    ):
        compare(run.index("scores"), other.index("dots"), 5)
    assert compare(run.index("scores"), run.index("scores"), 5)["proponent"]["overlap"] == 1.0
    show(answer(run, "0", None, None, 3, "scores"), Console(width=120))
    assert "proponents: they raise the logit of its class" in capsys.readouterr().out


def test_new_texts_are_answered_at_once(settings: Settings, inputs: Path) -> None:
    run = run_job(settings(method=METHOD))
    rows = [json.loads(line) for line in (inputs / "queries.jsonl").read_text().splitlines()]
    for query, row in enumerate(rows):
        [found] = run.score([row["text"]], [row["label"]], k=50)
        both = {one["id"]: one["score"] for one in (*found.proponents, *found.opponents)}
        np.testing.assert_allclose([both[i] for i in sorted(both)], dense(run)[sorted(both), query], rtol=1e-5)
        assert len(both) == 45


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_bit(settings: Settings, tmp_path: Path, workers: int) -> None:
    one = run_job(settings(method=METHOD))
    many = run_job(settings(method=METHOD, run=str(tmp_path / "many"), cluster={"workers": workers}))
    assert digests(one, *ARTEFACTS) == digests(many, *ARTEFACTS)


@pytest.mark.parametrize(("function", "call"), [("features", 2), ("head", 9), ("prepare", 1), ("score", 2)])
def test_a_killed_job_resumes_to_the_same_bits(
    settings: Settings, tmp_path: Path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(settings(method=METHOD, run=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        kill_in(function, call, patch)
        with pytest.raises(Killed):
            run_job(settings(method=METHOD))
    assert digests(run_job(settings(method=METHOD)), *ARTEFACTS) == digests(whole, *ARTEFACTS)


def test_another_query_set_needs_no_feature_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_job(settings(method=METHOD))
    before = digests(run, "features")
    monkeypatch.setitem(actors.worker.UNIT_FUNCTIONS, "features", None)
    run_job(settings(method=METHOD | {"logit": "predicted"}, output={"label": "others"}))
    assert digests(run, "features") == before


def test_a_head_that_is_not_stationary_is_no_head(settings: Settings, told: Told) -> None:
    said = told(settings(method=METHOD | {"max_iterations": 2}))
    assert "the head is not stationary after 2 iterations" in said
    assert "Raise max_iterations, or the penalty (now 0.01)" in said


def test_what_it_cannot_do_is_refused(settings: Settings, told: Told, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a dull film", "label": 0}\n' * 3)
    said = told(settings(method=METHOD, run=str(tmp_path / "one"), corpus=str(one)))
    assert "all training examples have class 0: method representer needs at least two classes" in said
    two = tmp_path / "two.jsonl"
    two.write_text('{"text": "a dull film", "label": 0}\n{"text": "a fine film", "label": 1}\n' * 3)
    said = told(settings(method=METHOD, run=str(tmp_path / "two"), corpus=str(two)))
    assert "a query has class 2, but training examples only 0 to 1: nothing raises its logit" in said
    with pytest.raises(ValueError, match="method.penalty=0 is not allowed: must be a number above 0"):
        make_config(settings(method=METHOD | {"penalty": 0}))
    assert "no rows: use exact" in told(settings(method=METHOD, output={"neighbours": "ivf"}))


def test_erased_examples_teach_nothing(settings: Settings) -> None:
    run = run_job(settings(method=METHOD))
    Corpus.open(run.location, "train").erase([3, 20])
    after = dense(run_job(settings(method=METHOD, output={"label": "after"})), "after")
    kept = np.setdiff1d(np.arange(45), [3, 20])
    o = oracle(run)
    f, labels = o["f"][kept], o["labels"][kept]
    wrong = torch.softmax(f @ newton(f, labels, 3, PENALTY).T, 1) - torch.nn.functional.one_hot(labels, 3)
    truth = (-wrong / (2 * PENALTY * len(f)))[:, o["asked"]] * (f @ o["q"].T)
    np.testing.assert_allclose(after[kept], truth.numpy(), rtol=1e-4, atol=1e-5)
    assert np.isnan(after[[3, 20]]).all()
