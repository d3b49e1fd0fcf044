"""Convolutions as matrices: the patches that a kernel meets, and the factors of its weight's gradient, (O, I·kh·kw).

Any number of spatial dimensions, stride, dilation, padding and padding mode, as torch's own layers have them. The patches
of one output position are one token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from engine.factors import Factor

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # transposed ones are not among them


def patches(module: _ConvNd, inner: Tensor) -> Tensor:
    """Return [B, T, groups, I/groups · kernel]: what the kernel meets at each of T output positions.

    `inner` is [B, I, *space]; the channel is the outer index, as in the stored weight.
    """
    dimensions = len(module.kernel_size)
    x = inner.reshape(-1, *inner.shape[-dimensions - 1 :])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    steps = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(steps, start=2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    space, kernel_axes = range(2, 2 + dimensions), range(2 + dimensions, 2 + 2 * dimensions)
    positions = x[0, 0].numel() // max(1, torch.Size(module.kernel_size).numel())
    return x.permute(0, *space, 1, *kernel_axes).reshape(len(x), positions, module.groups, -1)


def output_tokens(module: _ConvNd, delta: Tensor) -> Tensor:
    """Return [B, T, O] of a convolution's output or its gradient, [B, O, *space]."""
    return delta.reshape(-1, *delta.shape[-len(module.kernel_size) - 1 :]).flatten(2).transpose(1, 2)


def factors(module: _ConvNd, inner: Tensor | Factor, delta: Tensor) -> tuple[Factor, Factor]:
    """Return the (output, input) factors of the weight's gradient, from the module's input or its patches.

    A grouped convolution's matrix is block diagonal in time only, not in its rows: its gradient, small beside the
    activations, is made whole and given as its rows.
    """
    tokens = output_tokens(module, delta)
    if isinstance(inner, Factor):
        return Factor(tokens), inner
    grouped = tokens.unflatten(2, (module.groups, -1))
    gradient = torch.einsum("btgo,btgi->bgoi", grouped, patches(module, inner)).flatten(1, 2)
    return whole_factors(gradient)


def whole_factors(gradient: Tensor) -> tuple[Factor, Factor]:
    """Return the factors of a gradient that is there already, [B, O, I]: its rows, each with its place."""
    places = torch.arange(gradient.shape[1], device=gradient.device).expand(len(gradient), -1)
    return Factor(places, gradient.shape[1]), Factor(gradient)
