"""Attention of a bfloat16 model in float32: on a CPU, one bfloat16 attention operation costs more than all its products.

Matrix products gain from bfloat16 where the processor has instructions for them. The attention kernel does not: on the
MiniLM of the benchmark `collect` a pass in bfloat16 throughout takes as long as in float32, with float32 attention less
than half.
"""

from typing import Any

import torch
from torch import Tensor, nn

FLOAT32 = "sdpa-float32"


def attention_for(asked: str, compute: str, device: torch.device) -> str:
    """Return the attention implementation: the one asked for; `auto` is sdpa, in float32 for a bfloat16 model on a CPU."""
    if asked != "auto":
        return asked
    return FLOAT32 if compute == "bfloat16" and device.type == "cpu" else "sdpa"


def register(name: str) -> str:
    """Make the name known to transformers if it is ours, and return it."""
    if name == FLOAT32:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(name, _attend)
        AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Return transformers' own sdpa attention of the float32 inputs, in the inputs' dtype."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = (
        attention_mask.float() if attention_mask is not None and attention_mask.is_floating_point() else attention_mask
    )
    out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)
    return out.to(query.dtype), None
