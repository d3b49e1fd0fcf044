import pytest
import torch

from engine.attention import FLOAT32, attention_for, register
from tests.conftest import tiny_gpt2

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "compute", "device", "taken"),
    [
        ("auto", "float32", CPU, "sdpa"),
        ("auto", "bfloat16", CPU, FLOAT32),
        ("auto", "bfloat16", CUDA, "sdpa"),
        ("eager", "bfloat16", CPU, "eager"),
    ],
)
def test_only_bfloat16_on_a_cpu_attends_in_float32(asked, compute, device, taken):
    assert attention_for(asked, compute, device) == taken


def logits(dtype: torch.dtype, attention: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = tiny_gpt2().to(dtype).eval()
    model.set_attn_implementation(register(attention))
    ids = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5]])).long()
    out = model(input_ids=ids, attention_mask=mask).logits
    return out[mask.bool()].float()


def test_a_float32_model_attends_as_ever():
    assert torch.equal(logits(torch.float32, FLOAT32), logits(torch.float32, "sdpa"))


def test_a_bfloat16_model_computes_its_attention_in_float32(monkeypatch):
    seen = []
    own = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *args, **kwargs):
        seen.append(query.dtype)
        return own(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    close = logits(torch.bfloat16, FLOAT32)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(close, logits(torch.float32, "sdpa"), rtol=0.05, atol=0.02)
