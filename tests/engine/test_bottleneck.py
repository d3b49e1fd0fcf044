"""Houlsby adapters: where they go, what they compute, and that everything around them stays as it was."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.bottleneck import (
    TRAINED,
    Adapter,
    adapter_widths,
    add_adapters,
    head_layers,
    matching_projections,
    restore_adapters,
    top_third,
    widen_head,
)
from engine.gradients import PerExampleGradients
from engine.models import load_hugging_face, save_checkpoint
from engine.parameters import select_parameters
from engine.projectors import Whole
from engine.training import freeze
from tests import oracles
from tests.conftest import randomise, text_loss, tiny_bert, tiny_gpt2, token_batch, token_loss

MODELS = {"bert": (tiny_bert, text_loss), "gpt2": (tiny_gpt2, token_loss)}
PLACES = {
    "bert": [f"bert.encoder.layer.{i}.{part}output.dense" for i in (0, 1) for part in ("attention.", "")],
    "gpt2": [f"transformer.h.{i}.{part}.c_proj" for i in (0, 1) for part in ("attn", "mlp")],
}


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_follows_every_output_projection(name: str) -> None:
    make, loss = MODELS[name]
    model, batch = make().double(), token_batch()
    truth = loss(model, batch)
    state = {key: weight.clone() for key, weight in model.state_dict().items()}
    assert add_adapters(model, 4) == PLACES[name] == list(adapter_widths(model))
    found = loss(model, batch)
    assert not torch.equal(found, truth)
    assert torch.allclose(found, truth, rtol=1e-2)  # near the identity
    assert all(torch.equal(model.state_dict()[key], weight) for key, weight in state.items())
    for place in PLACES[name]:
        model.get_submodule(place).adapter.up.weight.data.zero_()
    assert torch.allclose(loss(model, batch), truth, rtol=1e-12)  # the identity


def test_the_call_is_the_projection_and_then_the_adapter() -> None:
    model = randomise(tiny_bert()).double()
    plain = copy.deepcopy(model.bert.encoder.layer[0].output.dense)
    add_adapters(model, 3)
    dense = randomise(model.bert.encoder.layer[0].output.dense, seed=4)
    plain.weight.data, plain.bias.data = dense.weight.data, dense.bias.data
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    h, adapter = plain(x), dense.adapter
    bottleneck = nn.functional.gelu(h @ adapter.down.weight.T + adapter.down.bias)
    assert torch.allclose(dense(x), h + bottleneck @ adapter.up.weight.T + adapter.up.bias, rtol=1e-12)
    assert torch.equal(adapter(h), dense(x))
    assert isinstance(adapter, Adapter)


def test_first_weights_come_from_the_seed_and_the_name() -> None:
    first, second, other = tiny_bert(), tiny_bert(), tiny_bert()
    torch.manual_seed(1)
    add_adapters(first, 4, ["*.1.output.dense"])
    torch.manual_seed(2)
    add_adapters(second, 4)
    add_adapters(other, 4, seed=1)
    name = "bert.encoder.layer.1.output.dense.adapter.down.weight"
    weights = [model.get_parameter(name).detach() for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].abs().max()) <= 2e-2 + 1e-9
    assert float(weights[0].std()) == pytest.approx(1e-2, rel=0.4)


def test_only_the_adapters_train() -> None:
    model = tiny_bert()
    add_adapters(model, 4)
    count = freeze(model, (TRAINED, "classifier.*"))
    assert count == 4 * (2 * 4 * 8 + 4 + 8) + 3 * 8 + 3
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(".adapter." in name or name.startswith("classifier.") for name in trained)


def test_a_checkpoint_with_adapters_is_read_with_them_and_by_others_without(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = tiny_bert()
    add_adapters(model, 4)
    randomise(model)
    truth = text_loss(model, token_batch())
    save_checkpoint(model, tmp_path)
    found = load_hugging_face(tmp_path, AutoModelForSequenceClassification, "eager").eval()
    assert torch.allclose(text_loss(found, token_batch()), truth, rtol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert adapter_widths(plain) == {}
    assert not torch.allclose(text_loss(plain, token_batch()), truth, rtol=1e-2)


def test_adapters_that_fit_nowhere_or_not_whole_are_refused() -> None:
    model = tiny_bert()
    add_adapters(model, 4)
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"model/x holds an adapter of bert.encoder.layer.0.+, which Linear does not"):
        restore_adapters(nn.Linear(2, 2), state, "model/x")
    del state[next(name for name in state if name.endswith("adapter.up.bias"))]
    with pytest.raises(ValueError, match=r"lacks the adapter weights bert.encoder.layer.0.attention.+up.bias"):
        restore_adapters(tiny_bert(), state, "model/x")


@pytest.mark.parametrize(("layers", "upper"), [(1, [0]), (2, [1]), (3, [2]), (4, [2, 3]), (6, [4, 5])])
def test_the_top_third_of_the_layers_and_the_head(layers: int, upper: list[int]) -> None:
    model = tiny_bert(num_hidden_layers=layers)
    found = top_third(matching_projections(model))
    assert [int(name.split(".")[3]) for name in found[::2]] == upper
    assert head_layers(model) == ["classifier"]


def test_a_head_that_is_tied_or_absent_is_none() -> None:
    assert head_layers(tiny_gpt2()) == []
    assert head_layers(nn.Linear(2, 2)) == []


def test_a_wide_head_is_its_linear_and_a_hidden_layer_and_nothing_at_first() -> None:
    model, batch = randomise(tiny_bert()).double(), token_batch()
    truth, state = text_loss(model, batch), model.state_dict()
    assert widen_head(model, 40) == "classifier"
    assert torch.equal(text_loss(model, batch), truth)
    assert all(torch.equal(model.state_dict()[key], weight) for key, weight in state.items())
    assert head_layers(model) == ["classifier"]
    assert adapter_widths(model) == {"classifier": 40}
    head = randomise(model.classifier, seed=4)
    x = torch.randn(5, 8, dtype=torch.float64)
    hidden = nn.functional.gelu(x @ head.adapter.down.weight.T + head.adapter.down.bias)
    assert torch.allclose(head(x), x @ head.weight.T + head.bias + hidden @ head.adapter.up.weight.T, rtol=1e-12)


def test_first_weights_of_a_wide_head_come_from_the_seed() -> None:
    models = [tiny_bert() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        widen_head(model, 400, seed=seed)
    first, second, other = (model.classifier.adapter.down.weight for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert float((first @ torch.ones(8)).std()) == pytest.approx(0.96, rel=0.1)  # 1, cut at 2 deviations


def test_a_checkpoint_with_a_wide_head_is_read_with_it_and_by_others_without(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = tiny_bert()
    add_adapters(model, 4)
    widen_head(model, 40)
    randomise(model)
    truth = text_loss(model, token_batch())
    save_checkpoint(model, tmp_path)
    found = load_hugging_face(tmp_path, AutoModelForSequenceClassification, "eager").eval()
    assert torch.allclose(text_loss(found, token_batch()), truth, rtol=1e-5)
    assert adapter_widths(found) == adapter_widths(model)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert adapter_widths(plain) == {}


@pytest.mark.parametrize("model", [tiny_gpt2(), nn.Linear(2, 2)])
def test_only_a_head_is_widened(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no head of its own"):
        widen_head(model, 8)


def test_per_example_gradients_of_a_wide_head_are_exact() -> None:
    model, batch = tiny_bert().double(), token_batch()
    widen_head(model, 40)
    randomise(model)
    parameters = select_parameters(model, ["classifier*"])
    truth = oracles.gradients(model, text_loss, batch)
    with PerExampleGradients(model, parameters, Whole(parameters)) as engine:
        found = engine(text_loss, batch)
    assert len(parameters) == 5
    for parameter in parameters:
        assert oracles.relative_error(found.arrays[parameter.name], truth[parameter.name].flatten(1)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_per_example_gradients_of_an_adapted_model_are_exact(name: str) -> None:
    """Of the adapters and of the projections that carry them."""
    make, loss = MODELS[name]
    model, batch = make().double(), token_batch()
    add_adapters(model, 4)
    parameters = select_parameters(model, ["*.adapter.*", PLACES[name][1]])
    truth = oracles.gradients(model, loss, batch)
    with PerExampleGradients(model, parameters, Whole(parameters)) as engine:
        found = engine(loss, batch)
    assert len(parameters) > 16
    for parameter in parameters:
        exact = truth[parameter.name]
        if PLACES["gpt2"][1] in parameter.name and exact.dim() == 3 and "adapter" not in parameter.name:
            exact = exact.transpose(1, 2)
        assert oracles.relative_error(found.arrays[parameter.name], exact.flatten(1)) < 1e-10


@pytest.mark.parametrize(
    ("width", "projections", "words"),
    [
        (0, ["*.dense"], "width 0 is not allowed"),
        (4, ["*.o_proj"], r"no module of BertForSequenceClassification matches \*.o_proj"),
        (4, ["*.attention.output"], "is a BertSelfOutput: only a Linear or Conv1D"),
    ],
)
def test_what_cannot_be_adapted_is_refused(width: int, projections: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        add_adapters(tiny_bert(), width, projections)


def test_a_second_adapter_on_the_same_projection_is_refused() -> None:
    model = tiny_bert()
    add_adapters(model, 4)
    with pytest.raises(ValueError, match="is a AdaptedLinear"):
        add_adapters(model, 4)
