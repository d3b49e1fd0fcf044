"""Normalisations of transformers, recognised by what they compute."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from engine import gradients, norms
from engine.batches import Batch
from engine.gradients import PerExampleGradients
from engine.norms import is_scaled_norm
from engine.parameters import select_parameters, supported_parameters
from engine.projectors import Whole
from tests import oracles
from tests.conftest import randomise

KNOWN = [LlamaRMSNorm, Qwen2RMSNorm, Olmo2RMSNorm, T5LayerNorm, GemmaRMSNorm, Gemma3nRMSNorm]


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 6), norm, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x))))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def assert_exact(kind: type[nn.Module], dtype: torch.dtype, tolerance: float) -> None:
    model = randomise(Normed(kind(6))).to(dtype)
    batch = Batch(torch.arange(4), {"x": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)})
    parameters = select_parameters(model, ["*"])
    with PerExampleGradients(model, parameters, Whole(parameters), norms=True) as hooks:
        out = hooks(loss, batch)
    truth = oracles.gradients(model, loss, batch)
    assert list(out.arrays) == list(truth)
    for index, (name, found) in enumerate(out.arrays.items()):
        assert oracles.relative_error(found, truth[name].flatten(1)) <= tolerance, name
        assert oracles.relative_error(out.norms[:, index], truth[name].flatten(1).norm(dim=1)) <= tolerance, name


@pytest.mark.parametrize("kind", KNOWN)
def test_the_scale_of_a_transformers_norm_is_exact(kind):
    """Most of them normalise in float32 whatever the model's dtype, so a batch and an example alone differ by as much."""
    assert_exact(kind, torch.float64, 1e-6)
    assert_exact(kind, torch.float32, 1e-5)


class WideRMSNorm(nn.Module):
    """Llama's formula in the model's own precision."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class OneMoreRMSNorm(WideRMSNorm):
    """Gemma's: the weight is added to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("kind", [WideRMSNorm, OneMoreRMSNorm])
def test_both_forms_are_exact_in_float64(kind, caught):
    def compare() -> None:
        assert_exact(kind, torch.float64, 1e-10)

    caught(compare, gradients, "normalised", lambda module, inner: inner)
    caught(compare, gradients, "normalised", lambda module, inner: module(inner))  # the weight multiplied in twice
    caught(compare, norms, "_with_scale", lambda module, scale, inner: module(inner))


class SquaredNorm(WideRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.square() * x


class MixingNorm(WideRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(0))


class CrossedNorm(WideRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.flip(0) * x


class UnusedNorm(WideRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x


class BrokenNorm(WideRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.reshape(7, 11)


class FourDimensionsNorm(WideRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        return self.weight * x


class TwoAnswersNorm(WideRMSNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.weight * x, x


class RecordNorm(WideRMSNorm):
    def forward(self, x: Any) -> Tensor:
        return self.weight * x.hidden


class MappingNorm(WideRMSNorm):
    def forward(self, x: Any) -> Tensor:
        raise KeyError("x")


@pytest.mark.parametrize("kind", [FourDimensionsNorm, TwoAnswersNorm, RecordNorm, MappingNorm])
def test_a_module_that_fails_on_the_probe_is_not_supported(kind: type[nn.Module]) -> None:
    assert supported_parameters(Normed(kind(6)))[1] == ["norm.weight"]


@pytest.mark.parametrize("kind", [SquaredNorm, MixingNorm, CrossedNorm, UnusedNorm, BrokenNorm, Qwen3NextRMSNormGated])
def test_what_is_not_the_formula_is_not_supported(kind):
    model = Normed(kind(6))
    assert not is_scaled_norm(model.norm)
    assert supported_parameters(model)[1] == ["norm.weight"]


def test_every_weight_of_a_llama_is_supported_and_its_dtype_does_not_matter():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert supported_parameters(LlamaForCausalLM(config).to(dtype))[1] == []


def test_a_batch_norm_on_the_statistics_of_its_batch_is_not_supported():
    assert supported_parameters(nn.BatchNorm1d(3))[1] == ["weight", "bias"]
    assert supported_parameters(nn.BatchNorm1d(3).eval())[1] == []
    assert supported_parameters(nn.BatchNorm1d(3, track_running_stats=False).eval())[1] == ["weight", "bias"]
