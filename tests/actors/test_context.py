import shutil
from pathlib import Path

import pytest
import torch

from actors.context import CheckpointSource, WorkerContext, make_task, named_parameters
from actors.specs import CheckpointSpec, GradientSpec, ModelSpec
from actors.states import open_state, save_state, state_key
from engine.methods.contract import QueryState
from engine.projection import Projection
from storage.checkpoints import fingerprint
from tests.conftest import ToyMlp, tiny_bert, toy_mlp

SPEC = GradientSpec(("classifier.weight", "classifier.bias"), Projection("two-sided", 4), True, 64)


@pytest.fixture
def model(tmp_path: Path, tokenizer_folder: Path) -> ModelSpec:
    specs = []
    for step in (1, 2):
        folder = tmp_path / f"c-{step}"
        tiny_bert().save_pretrained(folder)
        shutil.copytree(tokenizer_folder / "wrapped", folder, dirs_exist_ok=True)
        specs.append(CheckpointSpec(f"c-{step}", str(folder), step, 0.1, fingerprint(folder)))
    return ModelSpec("text-classification", {"max_tokens": 8}, tuple(specs), "float32", "eager")


@pytest.fixture
def context(tmp_path: Path) -> WorkerContext:
    return WorkerContext(str(tmp_path / "run"))


def test_one_checkpoint_is_held_at_a_time(context: WorkerContext, model: ModelSpec) -> None:
    first = context.model(model, "c-1")
    assert context.model(model, "c-1") is first
    assert not any(weight.requires_grad for weight in first.parameters())
    assert context.model(model, "c-2") is not first
    assert context.model(model, "c-1") is not first


def test_hooks_go_with_their_model(context: WorkerContext, model: ModelSpec) -> None:
    hooks = context.gradients(model, "c-1", SPEC)
    assert context.gradients(model, "c-1", SPEC) is hooks
    source = CheckpointSource(context, model, "c-2", SPEC, "rows")
    assert (source.learning_rate, source.parameters) == (0.1, SPEC.parameters)
    assert list(source.layout.arrays) == ["rows"]
    assert source.model() is context.model(model, "c-2")
    assert context.gradients(model, "c-1", SPEC) is not hooks


def test_weights_that_changed_are_refused(context: WorkerContext, model: ModelSpec) -> None:
    (Path(model.checkpoints[1].uri) / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="c-2 has changed since this run began: restore it, or use another run"):
        context.folder(model, "c-2")


def test_a_task_takes_tokenizer_and_attention_from_the_model(model: ModelSpec, tmp_path: Path) -> None:
    task = make_task(model, Path(model.checkpoints[0].uri), tmp_path)
    assert (task.attention, task.max_tokens, task.labels.count) == ("eager", 8, 3)  # type: ignore[attr-defined]


def test_parameters_come_by_name_in_the_order_asked_for() -> None:
    names = ("head.bias", "first.weight")
    assert tuple(p.name for p in named_parameters(ToyMlp(), names)) == names


def test_states_are_kept_within_their_bytes(context: WorkerContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(value: float) -> QueryState:
        return QueryState({"rows": torch.full((10, 10), value)}, None, torch.zeros(10).double(), 1.0, (0,))

    size = state(0.0).nbytes
    assert size == 10 * 10 * 4 + 10 * 8
    for label in ("a", "b"):
        for i in range(4):
            context.run.create(state_key(label, f"c{i}"), save_state(state(float(i))))
    read: list[str] = []
    monkeypatch.setattr("actors.context.open_state", lambda run, *at: (read.append(at[1]), open_state(run, *at))[1])
    monkeypatch.setattr("actors.context.STATE_BYTES", 2 * size)
    for _ in range(3):
        for i in range(4):
            assert context.state("a", f"c{i}").arrays["rows"][0, 0] == i
            assert context.state("a", f"c{i}") is context.state("a", f"c{i}"), "the one in use stays"
    assert read == ["c0", "c1", *["c2", "c3"] * 3]
    context.state("b", "c0")
    assert read[-1] == "c0", "another label's states take the place"
    assert sum(one.nbytes for one in context._held["states"][1].values()) == size


def test_hooks_keep_the_queries_they_multiply_with(monkeypatch: pytest.MonkeyPatch) -> None:
    context = WorkerContext("run")
    monkeypatch.setattr(context, "model", lambda *_: toy_mlp())
    spec = GradientSpec(("head.weight",), Projection("none"), False, 100)
    model = ModelSpec("t", {}, (CheckpointSpec("c", "u", 0, 1.0, "f"),), "float32", "sdpa")
    for number in range(20):  # an address that is used again must not stand for the queries that were there before
        blocks = QueryState({"head.weight": torch.full((1, 18), float(number))}, None, torch.zeros(1), 1.0, (0,))
        hooks = context.gradients(model, "c", spec, "onto", blocks)
        assert float(hooks.projector._blocks["head.weight"][0, 0]) == number
        del blocks
