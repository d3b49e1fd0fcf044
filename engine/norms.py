"""Normalisations of any library: recognised by what they compute, and what their scale multiplies.

A scale w stands in y = w ⊙ f(x) + g(x), so that its gradient is Σ δ ⊙ f(x) and f(x) = y(w = 1) − y(w = 0): a plain weight
(Llama, Qwen, T5), one that is added to 1 (Gemma), with a bias or without.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

CHANNELS_SECOND = (_BatchNorm, nn.GroupNorm)  # the others scale the last dimension
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}  # libraries normalise in float32; half precision rounds more


def is_scaled_norm(module: nn.Module) -> bool:
    """Tell whether a module that we do not know is w ⊙ f(x) + g(x) on every row by itself, seen from a few rows.

    Asked only of modules called a norm whose one vector is all they hold; what the probe cannot run is not one.
    """
    state = [*module.parameters(), *module.buffers()]
    if "norm" not in type(module).__name__.lower() or len(state) != 1 or state[0].dim() != 1:
        return False
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in needed) != 1:
        return False
    try:
        return _scales_every_row(module, state[0])
    except Exception:
        return False


def _scales_every_row(module: nn.Module, weight: Tensor) -> bool:
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, weight.numel(), generator=draw).to(weight.dtype) for shape in ((2, 3), ()))
    with torch.no_grad():
        at_one, at_zero, at_w = (
            _with_scale(module, scale, x) for scale in (torch.ones_like(w), torch.zeros_like(w), w)
        )
        alone = _with_scale(module, w, x[1:, 2:])
    bound = _TOLERANCE.get(weight.dtype, 0.05)
    return (
        at_w.shape == x.shape
        and torch.allclose(at_w, at_zero + w * (at_one - at_zero), rtol=bound, atol=bound)
        and torch.allclose(alone, at_w[1:, 2:], rtol=bound, atol=bound)
        and not torch.allclose(at_one, at_zero)
    )


def normalised(module: nn.Module, inner: Tensor) -> Tensor:
    """Return f(x): what the module's scale is multiplied with."""
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(inner, list(module.normalized_shape), eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(inner, list(module.normalized_shape), eps=module.eps)
    weight = next(module.parameters())
    return _with_scale(module, torch.ones_like(weight), inner) - _with_scale(module, torch.zeros_like(weight), inner)


def _with_scale(module: nn.Module, scale: Tensor, inner: Tensor) -> Tensor:
    (name,) = [name for name, _ in module.named_parameters() if name != "bias"]
    return functional_call(module, {name: scale}, (inner,))
