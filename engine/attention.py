"""Attention of a bfloat16 model in float32: on a CPU, one bfloat16 attention operation costs more than all its products.

Matrix products gain from bfloat16 where the processor has instructions for them. The attention kernel does not: on the
MiniLM of the benchmark `collect` a pass in bfloat16 throughout takes as long as in float32, with float32 attention less
than half. Models of transformers that attend by its interface take this up under the name `sdpa`: some look at the name to
decide what else they do, so it stays. Others attend as they are written.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@cache
def attend_in_float32() -> None:
    """Let transformers' sdpa attention on a CPU compute bfloat16 inputs in float32. Float32 inputs pass unchanged."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        if query.dtype != torch.bfloat16 or query.device.type != "cpu":
            return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        mask = attention_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)
        return out.to(query.dtype), None

    AttentionInterface.register("sdpa", attend)
