"""Multi-stage influence of the whole job against Theorem 1 written out with whole matrices, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from actors import multistage, solver_states
from actors.score import load_scores
from engine.tasks.causal_lm import CausalLM
from engine.tasks.text_classification import TextClassification
from launch.run import Run
from tests import oracles
from tests.conftest import randomise, tiny_bert, tiny_gpt2
from tests.end_to_end.answers import dense, digests, everything
from tests.end_to_end.conftest import Settings, Told, run_job, write_texts
from tests.end_to_end.test_same_result import Killed, kill_in
from tests.masked_models import tiny_masked_bert, write_mask_tokenizer

W = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
HEAD = ["classifier.weight", "classifier.bias"]
L2, ALPHA, FIRST = 0.2, 0.05, 40
METHOD = {
    "name": "multistage", "curvature": "hessian", "solver": "exact", "dtype": "float64", "damping_absolute": 1e-6,
    "pretrain_damping_absolute": 1e-6, "l2": L2, "pretrain_l2": L2, "query_block": 3,
}  # fmt: skip
UPDATED = {"case": "updated", "alpha": ALPHA}
DAMPED = {"curvature": None, "damping_absolute": 0.1, "pretrain_damping_absolute": 0.1}
ARTEFACTS = ("states", "scores", "index")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Folders of a pretrained classifier and of two fine-tuned ones, with W fixed and updated; texts of pretraining."""
    folder = tmp_path_factory.mktemp("stages")
    write_texts(folder / "pretrain.jsonl", FIRST, first=300)
    pretrained = tiny_bert()
    for name in ("pretrained", "fixed", "updated"):
        model = tiny_bert()
        if name != "pretrained":
            model.load_state_dict(pretrained.state_dict())
            model.classifier = randomise(nn.Linear(8, 3))
            model.classifier.weight.data *= -0.7
        if name == "updated":
            for weight in model.bert.pooler.parameters():
                weight.data += 0.1 * torch.cos(torch.arange(weight.numel())).reshape(weight.shape)
        model.save_pretrained(folder / name)
        for file in (tokenizer_folder / "wrapped").iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


Job = Callable[..., Run]


@pytest.fixture
def stages(settings: Settings, models: Path) -> Callable[..., dict[str, Any]]:
    """Make configs of a job over both stages; `method` and `pretrain` extend their sections."""

    def make(method: dict[str, Any] | None = None, pretrain: dict[str, Any] | None = None, **sections: Any) -> dict:
        case = (method or {}).get("case", "fixed")
        first = {
            "task": {"settings": {"max_tokens": 16}}, "checkpoints": str(models / "pretrained"),
            "corpus": str(models / "pretrain.jsonl"), "shared": {"bert.pooler.*": "bert.pooler.*"}, "modules": ["classifier"],
        }  # fmt: skip
        return settings(**{
            "checkpoints": str(models / case), "method": METHOD | (method or {}), "pretrain": first | (pretrain or {}),
            "gradients": {"modules": ["classifier"], "projection": "none", "store": False, "token_budget": 1000},
        } | sections)  # fmt: skip

    return make


@dataclass(frozen=True)
class Stage:
    """One stage's matrices over (W, its own): mean Hessian with its L2 term, and gradients."""

    hessian: Tensor
    gradients: Tensor  # [n, p]


@dataclass(frozen=True)
class Truth:
    """Both parts of −I/m, [m, Q]."""

    through_own: np.ndarray
    through_shared: np.ndarray
    bound: np.ndarray


def stage(run: Run, folder: Path, name: str, of: str) -> tuple[Stage, Tensor]:
    task = TextClassification(tokenizer=str(folder), model=str(folder), max_tokens=16)
    model = task.build(folder).double().eval()
    batches = [task.collate(everything(run, which)) for which in (name, of)]
    hessian = oracles.hessian(model, task.loss, batches[0], W + HEAD) / len(batches[0])
    rows = [oracles.flat(oracles.gradients(model, task.loss, batch), W + HEAD) for batch in batches]
    return Stage(hessian + (L2 + 1e-6) * torch.eye(len(hessian)), rows[0]), rows[1]


def truth(run: Run, models: Path, case: str) -> Truth:
    """Return what every pretraining example does forwards: to W̄, by it to Θ and W, by these to every query."""
    pre, _ = stage(run, models / "pretrained", "pretrain", "asked")
    fine, f = stage(run, models / case, "train", "asked")
    w = 8 * 8 + 8
    moved = -torch.linalg.solve(pre.hessian, pre.gradients.T)[:w]  # ∂W̄/∂ε of every z, (w, m)
    if case == "fixed":
        joint = fine.hessian
        through = -torch.linalg.solve(joint[w:, w:], joint[w:, :w] @ moved)
        shared = moved
    else:
        held = fine.hessian.clone()
        held[:w, :w] += 2 * ALPHA * torch.eye(w)
        pulled = torch.zeros(len(held), moved.shape[1], dtype=torch.float64)
        pulled[:w] = 2 * ALPHA * moved
        both = torch.linalg.solve(held, pulled)
        shared, through = both[:w], both[w:]
    m = len(pre.gradients)
    parts = [-(f[:, w:] @ through).T / m, -(f[:, :w] @ shared).T / m]
    bound = np.outer(pre.gradients.norm(dim=1), f.norm(dim=1)) / L2 / m
    return Truth(*(part.numpy() for part in parts), bound=bound)


def kept(run: Run, name: str) -> np.ndarray:
    keys = run.location.list("scores/scores/shards")
    return np.concatenate([getattr(load_scores(run.location, key), name) for key in keys])


@pytest.mark.parametrize("method", [{}, UPDATED], ids=["fixed", "updated"])
def test_scores_and_both_parts_are_those_of_the_theorem(stages: Callable, models: Path, method: dict) -> None:
    run = run_job(stages(method))
    found = truth(run, models, method.get("case", "fixed"))
    whole = found.through_own + found.through_shared
    assert (np.abs(dense(run) - whole) <= 1e-5 * found.bound).all()
    assert np.abs(whole).max() > 1e-3 * found.bound.max()
    np.testing.assert_allclose(kept(run, "totals"), whole.sum(1), atol=1e-5 * found.bound.max())
    np.testing.assert_allclose(kept(run, "total_through_own"), found.through_own.sum(1), atol=1e-5 * found.bound.max())
    index = run.index()
    assert index.meta["corpus"] == "pretrain"
    assert index.meta["score_unit"] == "per_example_loo"
    rows = [row for batch in index.table("by_query") for row in batch.to_pylist()]
    assert len(rows) == whole.size
    for row in rows:
        place = row["id"], row["query"]
        near = 1e-5 * found.bound.max()
        assert row["through_finetuned"] == pytest.approx(found.through_own[place], abs=near)
        assert row["through_shared"] == pytest.approx(found.through_shared[place], abs=near)
    one = index.example(7)
    assert one["total"] == pytest.approx(one["total_through_finetuned"] + one["total_through_shared"])
    asked = run.top(2, k=1).to_pylist()[0]
    best = int(whole[:, 2].argmax())
    assert (asked["id"], asked["snippet"]) == (best, everything(run, "pretrain")[best]["text"])


def test_from_a_causal_language_model_to_a_classifier(
    stages: Callable, models: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """W: the table of words, which the language model's head is tied to."""
    language = tiny_gpt2()
    settings = language.config.to_dict() | {"num_labels": 3, "pad_token_id": 0}
    classifier = randomise(GPT2ForSequenceClassification(GPT2Config(**settings)))
    classifier.transformer.load_state_dict(language.transformer.state_dict())
    for model, name in ((language, "language"), (classifier, "classifier")):
        model.save_pretrained(tmp_path / name)
        for file in (tokenizer_folder / "wrapped").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    words, last, head = (
        ["transformer.wte.weight"],
        ["transformer.ln_f.weight", "transformer.ln_f.bias"],
        ["score.weight"],
    )
    pretrain = {
        "task": {"name": "causal-lm", "settings": {"max_tokens": 8}}, "checkpoints": str(tmp_path / "language"),
        "shared": {words[0]: words[0]}, "modules": ["transformer.ln_f"],
    }  # fmt: skip
    gradients = {"modules": ["score"], "projection": "none", "store": False, "token_budget": 1000}
    few = {"corpus": {"path": str(models / "pretrain.jsonl"), "limit": 8}}
    run = run_job(
        stages({"query_block": 16}, pretrain | few, checkpoints=str(tmp_path / "classifier"), gradients=gradients)
    )

    def of(task: Any, name: str, queries: str, folder: str, names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        model = task.build(tmp_path / folder).double().eval()
        batches = [task.collate(everything(run, which)) for which in (name, queries)]
        hessian = oracles.hessian(model, task.loss, batches[0], names) / len(batches[0])
        rows = [oracles.flat(oracles.gradients(model, task.loss, batch), names) for batch in batches]
        return hessian + (L2 + 1e-6) * torch.eye(len(hessian)), *rows

    folders = {name: str(tmp_path / name) for name in ("language", "classifier")}
    first = CausalLM(tokenizer=folders["language"], max_tokens=8)
    second = TextClassification(tokenizer=folders["classifier"], model=folders["classifier"], max_tokens=16)
    g_hessian, g, _ = of(first, "pretrain", "pretrain", "language", words + last)
    f_hessian, _, f = of(second, "train", "asked", "classifier", words + head)
    w = language.transformer.wte.weight.numel()
    moved = -torch.linalg.solve(g_hessian, g.T)[:w]
    theta = -torch.linalg.solve(f_hessian[w:, w:], f_hessian[w:, :w] @ moved)
    whole = (-(f[:, w:] @ theta + f[:, :w] @ moved).T / len(g)).numpy()
    assert np.abs(dense(run) - whole).max() <= 1e-5 * np.abs(whole).max()


def test_a_summed_query_set_is_one_query_and_costs_two_solves(stages: Callable, models: Path) -> None:
    run = run_job(stages({"asked": "sum"}))
    found = truth(run, models, "fixed")
    whole = (found.through_own + found.through_shared).sum(1, keepdims=True)
    assert dense(run).shape == whole.shape
    assert (np.abs(dense(run) - whole) <= 1e-5 * found.bound.sum(1, keepdims=True)).all()
    assert len(run.index().meta["solve"]["pretraining"]["residual"]) == 2


MUTANTS = {
    "U dropped": ("fixed", lambda f, own, joint, pretraining, shared: multistage.Parts(*(
        shared.padded(part[shared.pretraining]) for part in vars(FIXED(f, own, joint, pretraining, shared)).values()))),
    "α for 2α": ("updated", lambda f, own, pretraining, shared, alpha: UPDATED_(
        f, own, pretraining, shared, alpha / 2)),
}  # fmt: skip
FIXED, UPDATED_ = multistage.fixed, multistage.updated


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_seen(stages: Callable, models: Path, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, wrong = MUTANTS[mutant]
    monkeypatch.setattr(multistage, case, wrong)
    run = run_job(stages(UPDATED if case == "updated" else {}))
    found = truth(run, models, case)
    assert not (np.abs(dense(run) - found.through_own - found.through_shared) <= 1e-5 * found.bound).all()


@pytest.mark.parametrize(
    ("solver", "case"), [("cg", {}), ("squared-cg", UPDATED), ("lissa", UPDATED)], ids=["cg", "squared-cg", "lissa"]
)
def test_the_number_of_workers_changes_no_bit(stages: Callable, tmp_path: Path, solver: str, case: dict) -> None:
    method = {
        "solver": solver,
        "curvature": None,
        "damping_absolute": 0.1,
        "pretrain_damping_absolute": 0.1,
        "depth": 5,
    }
    left = []
    for workers in (1, 2, 3):
        sections = {"run": str(tmp_path / f"run-{workers}"), "cluster": {"workers": workers}}
        left.append(run_job(stages(case | method | {"tolerance": 1e-3}, **sections)))
    one, *others = [digests(run, *ARTEFACTS) for run in left]
    assert all(other == one for other in others)


def test_sampled_examples_estimate_the_hessians(stages: Callable) -> None:
    run = run_job(stages({"rows": 20, "pretrain_rows": 10}))
    said = run.index().meta["solve"]
    assert (said["finetuning"]["examples"], said["pretraining"]["examples"]) == (20, 10)


@pytest.mark.parametrize(("function", "call"), [("curvature", 4), ("curvature", 30), ("multistage", 1)])  # fmt: skip
def test_a_killed_job_resumes_to_the_same_bits(
    stages: Callable, tmp_path: Path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = UPDATED | {
        "solver": "cg",
        "curvature": None,
        "damping_absolute": 0.1,
        "pretrain_damping_absolute": 0.1,
        "tolerance": 1e-3,
    }
    monkeypatch.setattr(solver_states, "SECONDS", 0.0)  # every state is saved
    undisturbed = run_job(stages(method, run=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        kill_in(function, call, patch)
        with pytest.raises(Killed):
            run_job(stages(method))
    again = run_job(stages(method))
    assert digests(undisturbed, *ARTEFACTS) == digests(again, *ARTEFACTS)


def test_a_masked_language_model_is_the_first_stage_of_a_classifier(
    stages: Callable, settings: Settings, tmp_path: Path
) -> None:
    base, fine = tmp_path / "lm", tmp_path / "classifier"
    lm, classifier = tiny_masked_bert(), tiny_bert(vocab_size=tiny_masked_bert().config.vocab_size)
    classifier.bert.load_state_dict(lm.bert.state_dict(), strict=False)
    for model, folder in ((lm, base), (classifier, fine)):
        model.save_pretrained(folder)
        write_mask_tokenizer(folder)
    pretrain = {
        "task": {"name": "masked-lm", "settings": {"max_tokens": 8}}, "checkpoints": str(base),
        "shared": {"bert.encoder.*": "bert.encoder.*", "bert.embeddings.*": "bert.embeddings.*"},
        "modules": ["cls"],
    }  # fmt: skip
    method = {"solver": "cg", "curvature": "gauss-newton", "damping_absolute": 0.5, "pretrain_damping_absolute": 0.5}
    run = run_job(stages(method, pretrain, checkpoints=str(fine)))
    scores = dense(run)
    assert scores.shape[1] == 5
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() > 0
    assert run.index().meta["granularity"] == "chunk"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pretrain": {"shared": {"bert.pooler.dense.weight": "classifier.weight"}}},
     "bert.pooler.dense.weight is (8, 8) in pretraining and classifier.weight (3, 8) in fine-tuning"),
    ({"pretrain": {"shared": {"lost": "classifier.weight"}}}, "pretrain.shared: lost matches no weight of pretraining"),
    ({"pretrain": {"shared": {"classifier.weight": "lost"}}}, "pretrain.shared: fine-tuning has no weight lost"),
    ({"pretrain": {"shared": {"bert.*": "bert"}}}, "bert.*: bert is not allowed: one * in both, or none"),
    ({"pretrain": {"shared": {}}}, "pretrain.shared is empty"),
    ({"pretrain": {"modules": ["lost"]}}, "pretrain.modules='lost' matches no parameter"),
    ({"gradients": {"modules": ["bert.pooler"], "projection": "none", "store": False}}, "no weight of its own"),
    ({"gradients": {"modules": ["classifier"]}}, "set gradients.projection=none and gradients.store=false"),
    ({"method": {"alpha": 0.1}}, "method.alpha=0.1 is not allowed with method.case=fixed"),
    ({"method": {"solver": "newton"}}, "method.solver='newton' is not allowed: must be 'cg', 'squared-cg'"),
    ({"method": {"case": "updated"}}, "method.alpha is not set"),
    ({"pretrain": {"corpus": "lost.jsonl"}}, "lost.jsonl"),
    ({"pretrain": {"task": {"settings": {"max_tokens": "many"}}}}, "pretrain.task.settings.max_tokens='many' is not allowed"),
    ({"method": {"tolerance": 2.0}}, "method.tolerance=2.0 is not allowed"),
    ({"pretrain": {"share": {}}}, "pretrain.share is not known. Did you mean pretrain.shared?"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), REFUSED)
def test_bad_input_is_refused_before_there_is_a_run(
    stages: Callable, told: Told, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    assert said in told(stages(**wrong))
    assert not (tmp_path / "run/corpus").exists()


def test_a_w_that_moved_is_refused_where_it_is_said_to_be_fixed(stages: Callable, models: Path, told: Told) -> None:
    said = told(stages(checkpoints=str(models / "updated")))
    assert "bert.pooler.dense.weight differs between pretraining and fine-tuning" in said


def test_the_sections_of_two_stages_and_their_method_go_together(stages: Callable, told: Told) -> None:
    together = "method.name=multistage and the section pretrain belong together"
    assert together in told(stages() | {"method": {"name": "influence"}})
    assert together in told({k: v for k, v in stages().items() if k != "pretrain"})
