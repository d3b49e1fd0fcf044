import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.parameters import changed_parameters, matches, select_parameters, supported_parameters
from tests.conftest import ToyMlp, tiny_bert, tiny_gpt2


def roles(model: nn.Module, name: str) -> list[str]:
    return [use.role for use in next(p for p in supported_parameters(model)[0] if p.name == name).uses]


def test_every_parameter_of_the_tiny_models_is_supported():
    for model in (ToyMlp(), tiny_bert(), tiny_gpt2()):
        found, others = supported_parameters(model)
        assert others == []
        assert [p.name for p in found] == [name for name, _ in model.named_parameters()]
        assert sum(p.size for p in found) == sum(w.numel() for w in model.parameters())


def test_shapes_are_out_by_in_whatever_way_a_module_stores_them():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv, self.table = nn.Linear(2, 3), Conv1D(3, 2), nn.Embedding(7, 4)

    found = {p.name: (p.out_features, p.in_features) for p in supported_parameters(Mixed())[0]}
    assert found["linear.weight"] == (3, 2)
    assert found["conv.weight"] == (3, 2)
    assert found["table.weight"] == (4, 7)
    assert found["linear.bias"] == (3, 0)


@pytest.mark.parametrize(("vocabulary", "width"), [(32, 8), (8, 8)])
def test_a_tied_head_is_one_parameter_in_the_orientation_of_the_linear(vocabulary, width):
    model = tiny_gpt2(vocabulary, width)
    tied = next(p for p in supported_parameters(model)[0] if p.name == "transformer.wte.weight")
    assert (tied.out_features, tied.in_features) == (vocabulary, width)
    assert sorted(use.role for use in tied.uses) == ["embedding-transposed", "linear"]


def test_a_weight_shared_by_linear_and_conv1d_is_refused():
    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(3, 3), Conv1D(3, 3)
            self.conv.weight = self.linear.weight

    with pytest.raises(ValueError, match="shared by a Linear and a Conv1D"):
        supported_parameters(Twisted())


def test_layers_that_change_the_forward_pass_of_a_known_one_are_not_supported():
    class Scaled(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 3.0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = Scaled(5, 4), nn.Linear(4, 2)

    found, others = supported_parameters(Model())
    assert others == ["table.weight"]
    assert [p.name for p in found] == ["head.weight", "head.bias"]


def test_layers_that_read_weights_without_a_call_are_not_supported():
    _, others = supported_parameters(nn.MultiheadAttention(4, 2))
    assert set(others) == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert supported_parameters(nn.Embedding(4, 2, max_norm=1.0))[1] == ["weight"]
    assert supported_parameters(nn.Sequential(nn.ConvTranspose2d(1, 2, 3)))[1] == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("bert.encoder.layer.11.output.dense.weight", "bert.encoder.layer.1[01]", True),
        ("bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.1[01]", False),
        ("classifier.weight", "classifier", True),
        ("classifier_two.weight", "classifier", False),
        ("a.b.bias", "*.bias", True),
        ("a.b.weight", "*", True),
    ],
)
def test_globs_match_parameters_and_the_modules_around_them(name, pattern, hit):
    assert matches(name, pattern) is hit


def test_selection_keeps_the_order_of_the_model_and_counts_nothing_twice():
    model = tiny_bert()
    chosen = [p.name for p in select_parameters(model, ["classifier", "*.bias", "classifier.bias"])]
    assert chosen == [n for n, _ in model.named_parameters() if n.endswith(".bias") or n == "classifier.weight"]


def test_a_tied_parameter_answers_to_each_of_its_names():
    by_head, by_table = (select_parameters(tiny_gpt2(), [p]) for p in ("lm_head", "transformer.wte"))
    assert by_head == by_table
    assert by_head[0].name == "transformer.wte.weight"


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"gradients.modules='clasifier' matches no parameter"):
        select_parameters(tiny_bert(), ["classifier", "clasifier"])


def test_unsupported_matches_warn_and_nothing_else_left_is_refused():
    model = nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"no per-example gradients for 0.bias, 0.weight"):
        assert [p.name for p in select_parameters(model, ["*"])] == ["1.weight", "1.bias"]
    with pytest.warns(UserWarning, match="no per-example"), pytest.raises(ValueError, match="none of the chosen"):
        select_parameters(model, ["0"])


def test_changed_parameters_names_what_training_moved():
    before = {"a": torch.zeros(2), "b": torch.zeros(2), "n": torch.tensor(1)}
    after = {"a": torch.zeros(2), "b": torch.tensor([0.0, 1e-9]), "n": torch.tensor(2), "new": torch.ones(1)}
    assert changed_parameters(before, after) == ["b"]


def test_an_empty_list_of_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="gradients.modules is an empty list: name at least one module"):
        select_parameters(ToyMlp(), [])
