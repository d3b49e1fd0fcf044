"""LoRA adapters as PEFT leaves them: built on their base, never merged, exact against autograd."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from engine.adapters import adapter_base, adapter_parameters, with_adapter
from engine.coverage import measure_coverage
from engine.gradients import PerExampleGradients
from engine.models import load_hugging_face, read_state
from engine.parameters import select_parameters
from engine.projectors import Whole
from engine.tasks.contract import with_model_folder
from tests import oracles
from tests.conftest import randomise, text_loss, tiny_bert, tiny_gpt2, token_batch, token_loss


def left_by_peft(folder: Path, model: nn.Module, name: str = "adapter", spread: float = 0.3, **settings) -> Path:
    """Leave base/ and an adapter beside it; `spread` of what its matrices are moved by after their initialisation."""
    model.save_pretrained(folder / "base")
    again = type(model).from_pretrained(folder / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(again, peft.LoraConfig(r=2, lora_alpha=3, **settings))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += spread * torch.randn(weight.shape)
    adapted.save_pretrained(folder / name)
    return folder / name


def bert_adapter(folder: Path, **changes) -> Path:
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"]} | changes
    return left_by_peft(folder, tiny_bert(), **settings)


def loaded(folder: Path, kind: str = "AutoModelForSequenceClassification", **settings) -> nn.Module:
    import transformers

    return load_hugging_face(folder, getattr(transformers, kind), "eager", **settings)


def test_the_adapter_on_its_base_computes_what_peft_computes(tmp_path):
    folder, batch = bert_adapter(tmp_path), token_batch()
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    ours = loaded(folder).eval()
    assert torch.allclose(text_loss(ours, batch), text_loss(theirs, batch), rtol=1e-6)
    state = read_state(folder)
    names = adapter_parameters(ours)
    assert len(names) == len(state) == 2 * (2 * 4 + 1) + 2  # A and B of four layers a block and the pooler; the head
    for name in names:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name))
    assert any(name.endswith("query.base_layer.weight") for name, _ in ours.named_parameters())  # not merged


@pytest.mark.parametrize("kind", ["bert", "gpt2", "rslora"])
def test_gradients_of_the_matrices_equal_autograd(tmp_path, kind):
    if kind == "gpt2":
        folder = left_by_peft(tmp_path, tiny_gpt2(), task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"])
        model, loss = loaded(folder, "AutoModelForCausalLM").double().eval(), token_loss
    else:
        folder = bert_adapter(tmp_path, use_rslora=kind == "rslora", lora_dropout=0.5)
        model, loss = loaded(folder).double().eval(), text_loss
    names, batch = adapter_parameters(model), token_batch()
    parameters = select_parameters(model, names)
    assert [p.name for p in parameters] == names
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        out = hooks(loss, batch)
    truth = oracles.gradients(model, loss, batch)
    for index, name in enumerate(names):
        assert oracles.relative_error(out.arrays[name], truth[name].flatten(1)) <= 1e-10, name
        assert oracles.relative_error(out.norms[:, index], truth[name].flatten(1).norm(dim=1)) <= 1e-10, name


MORE: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all"},
    "their biases": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [1, 2]},
    "a module": {"modules_to_save": ["ln_f"]},
    "an embedding": {"target_modules": ["c_attn", "wte"]},
}


@pytest.mark.parametrize("what", MORE)
def test_all_that_training_moved_is_looked_at_or_named_as_missing(tmp_path: Path, what: str) -> None:
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"]} | MORE[what]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, on embeddings among the target modules
        folder = left_by_peft(tmp_path, tiny_gpt2(), **settings)
        base = type(tiny_gpt2()).from_pretrained(tmp_path / "base")
        trained = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
        model = loaded(folder, "AutoModelForCausalLM").double().eval()
    names = adapter_parameters(model)
    assert set(names) == {name for name, weight in trained.named_parameters() if weight.requires_grad}
    supported = [name for name in names if "wte" not in name]
    batches = [oracles.one_example(token_batch(), i) for i in range(2)]
    report = measure_coverage(model, select_parameters(model, supported), token_loss, batches, set(names))
    gradients = oracles.gradients(model, token_loss, token_batch().take([0, 1]))
    squares = {name: float(gradients[name].square().sum()) for name in names}
    share = sum(squares[name] for name in supported) / sum(squares.values())
    assert report.share == pytest.approx(share, rel=1e-9)
    assert {name for name, _ in report.missing} == set(names) - set(supported)
    assert (share < 0.999) == (what in ("tokens", "an embedding"))


def test_a_weight_of_the_base_that_the_file_repeats_unchanged_was_not_moved(tmp_path: Path) -> None:
    folder = left_by_peft(tmp_path, tiny_gpt2(), task_type="CAUSAL_LM", target_modules=["c_attn"], bias="all")
    state = read_state(folder)
    still = "base_model.model.transformer.h.0.ln_1.bias"
    state[still] = tiny_gpt2().transformer.h[0].ln_1.bias.detach()
    safetensors.torch.save_file(state, folder / "adapter_model.safetensors")
    assert sorted(adapter_parameters(loaded(folder, "AutoModelForCausalLM"))) == sorted(
        name.replace(".weight", ".default.weight") if ".lora_" in name else name for name in state if name != still
    )


def test_a_matrix_whose_partner_is_zero_is_named(tmp_path):
    """B starts at zero, so nothing flows to A: seen from the report, not from scores that are silently zero."""
    folder, batch = bert_adapter(tmp_path, spread=0.0), token_batch()
    model = loaded(folder).double().eval()
    parameters = select_parameters(model, adapter_parameters(model))
    report = measure_coverage(model, parameters, text_loss, [oracles.one_example(batch, i) for i in range(4)])
    assert set(report.silent) == {name for name in adapter_parameters(model) if ".lora_A." in name}
    moved = loaded(bert_adapter(tmp_path / "moved")).double().eval()
    parameters = select_parameters(moved, adapter_parameters(moved))
    assert measure_coverage(moved, parameters, text_loss, [oracles.one_example(batch, 0)]).silent == ()


def test_a_base_without_a_head_takes_it_from_the_adapter(tmp_path):
    folder = bert_adapter(tmp_path)
    tiny_bert().bert.save_pretrained(tmp_path / "headless")
    model = loaded(folder, base=str(tmp_path / "headless"), num_labels=3).eval()
    assert torch.allclose(text_loss(model, token_batch()), text_loss(loaded(folder).eval(), token_batch()), rtol=1e-6)
    without = bert_adapter(tmp_path / "other", task_type=None, name="plain")
    with pytest.raises(ValueError, match="2 weights are in neither .classifier.bias, classifier.weight"):
        loaded(without, base=str(tmp_path / "headless"), num_labels=3)


def test_a_missing_base_is_refused_saying_where_to_name_it(tmp_path):
    folder = bert_adapter(tmp_path)
    assert adapter_base(folder) == tmp_path / "base"
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"LoRA adapter of the model '.*/base', which is not a model folder .*settings.base"
    ):
        loaded(folder)
    with pytest.raises(ValueError, match="not a model folder"):
        adapter_base(folder, str(tmp_path))
    assert loaded(folder, base=str(tmp_path / "elsewhere"))


def test_an_adapter_of_another_base_or_another_kind_is_refused(tmp_path):
    folder = bert_adapter(tmp_path)
    wider = tmp_path / "wider"
    randomise(tiny_bert(hidden_size=12)).save_pretrained(wider)
    with pytest.raises(ValueError, match="does not fit its base model"):
        loaded(folder, base=str(wider))
    deeper = bert_adapter(tmp_path / "deep")
    with pytest.raises(ValueError, match="have no place in it"):
        with_adapter(tiny_bert(num_hidden_layers=1), deeper, read_state(deeper), [])
    with pytest.raises(ValueError, match="weights are in neither"):
        with_adapter(tiny_bert(num_hidden_layers=3), deeper, read_state(deeper), [])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="adapter of type IA3: only LORA is supported"):
        loaded(folder)


def test_a_built_in_task_reads_classes_and_tokenizer_where_they_are(tmp_path):
    folder = bert_adapter(tmp_path)
    base = str(tmp_path / "base")
    found = with_model_folder("text-classification", {}, folder)
    assert found == {"model": base, "base": base, "tokenizer": base}
    (folder / "vocab.txt").write_text("a")
    assert with_model_folder("causal-lm", {}, folder)["tokenizer"] == str(folder)
    assert with_model_folder("causal-lm", {"model": "m"}, folder)["model"] == "m"


def test_a_model_without_an_adapter_has_no_parameters_of_one():
    assert adapter_parameters(tiny_bert()) == []
