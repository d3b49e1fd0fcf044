"""The order of the chosen weights: that of gradient rows, in both directions."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine.coordinates import chosen_coordinates, top_layers
from engine.gradients import PerExampleGradients
from engine.parameters import select_parameters
from engine.projectors import Whole
from tests import oracles
from tests.conftest import tiny_bert, tiny_gpt2, token_batch, token_loss
from tests.engine.test_routed import mixtral, qwen_moe


def test_a_vector_is_a_whole_gradient_row(case: tuple) -> None:
    model, loss, batch = case
    parameters = select_parameters(model, ["*"])
    coordinates = chosen_coordinates(model, ["*"])
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False)) as hooks:
        block = coordinates.join(hooks(loss, batch).arrays)
    truth = oracles.gradients(model, loss, batch)
    for i in range(len(batch)):
        flat = coordinates.flat([truth[w.name][i] for w in coordinates.weights])
        assert oracles.relative_error(block[:, i], flat) < 1e-10


@pytest.mark.parametrize("make", [mixtral, qwen_moe])
def test_a_vector_is_a_whole_gradient_row_of_fused_experts(make: Callable[[], nn.Module]) -> None:
    model, batch = make().double(), token_batch()
    parameters, coordinates = select_parameters(model, ["*"]), chosen_coordinates(model, ["*"])
    assert any(p.is_fused for p in parameters)
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False)) as hooks, pytest.warns(match="alone"):
        block = coordinates.join(hooks(token_loss, batch).arrays)
    truth = oracles.gradients(model, token_loss, batch)
    for i in range(len(batch)):
        flat = coordinates.flat([truth[w.name][i] for w in coordinates.weights])
        assert oracles.relative_error(block[:, i], flat) < 1e-6  # routers and norms compute in float32


def test_all_ways_there_lead_back() -> None:
    coordinates = chosen_coordinates(tiny_gpt2(), ["transformer"])
    assert any(w.turned for w in coordinates.weights)
    block = torch.randn(coordinates.size, 2, dtype=torch.float64)
    assert torch.equal(coordinates.join(coordinates.split(block)), block)
    for column in block.T:
        tensors = coordinates.tensors(column)
        assert [tuple(t.shape) for t in tensors] == [w.shape for w in coordinates.weights]
        assert torch.equal(coordinates.flat(tensors), column)


def test_a_weight_of_any_module_can_be_chosen() -> None:
    coordinates = chosen_coordinates(nn.MultiheadAttention(4, 2), ["in_proj_weight"])
    assert [(w.name, w.shape, w.turned) for w in coordinates.weights] == [("in_proj_weight", (12, 4), False)]


@pytest.mark.parametrize(("count", "first"), [(1, "bert.encoder.layer.1."), (2, "bert.encoder.layer.0.")])
def test_top_layers_are_the_last_layers_and_all_after_them(count: int, first: str) -> None:
    names = top_layers(tiny_bert(), count)
    assert names[0].startswith(first)
    assert {"bert.pooler.dense.weight", "classifier.weight", "classifier.bias"} <= set(names)
    assert not any("embeddings" in name for name in names)
    assert top_layers(nn.Sequential(nn.Linear(2, 2))) == ["0.weight", "0.bias"]
    tied = top_layers(tiny_gpt2(), 1)
    assert tied[0].startswith("transformer.h.1.")
    assert tied[-2:] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
