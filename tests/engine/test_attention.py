import torch

from engine.attention import attend_in_float32
from tests.conftest import tiny_gpt2


def logits(dtype: torch.dtype, attention: str = "sdpa") -> torch.Tensor:
    attend_in_float32()
    torch.manual_seed(0)
    model = tiny_gpt2().to(dtype).eval()
    model.set_attn_implementation(attention)
    ids = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5]])).long()
    out = model(input_ids=ids, attention_mask=mask).logits
    return out[mask.bool()].float()


def test_a_float32_model_attends_as_ever(monkeypatch):
    mine = logits(torch.float32)
    torch.testing.assert_close(mine, logits(torch.float32, "eager"), rtol=1e-5, atol=1e-6)


def test_a_bfloat16_model_computes_its_attention_in_float32(monkeypatch):
    seen = []
    own = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *args, **kwargs):
        seen.append(query.dtype)
        return own(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    close = logits(torch.bfloat16)
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(close, logits(torch.float32), rtol=0.05, atol=0.02)
