"""Where the gradient of a module's output is taken on its way back.

A plain Linear goes back by itself, without the tokens whose output has no gradient at all: padding, and in the top layer
of a classifier everything but the token that it reads. They add nothing to any gradient, and nothing goes back to their
inputs, so that leaving them out changes no number.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Take = Callable[[Tensor, Tensor | None], None]  # a gradient; of which tokens [examples, T'], None for all


def tapped(module: nn.Module, inner: Tensor, output: Tensor, examples: int, take: Take) -> Tensor:
    """Return the module's output such that `take` is given its gradient; the graph starts here if none has started.

    `take` sees the output's shape, or [examples, T', O] with the positions of these tokens among all of an example's.
    """
    if _is_plain(module):
        return _Linear.apply(inner, output.detach().requires_grad_(), module.weight, examples, take)
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    elif output._is_view():
        # an in-place activation after it would take a view's hook off the graph: the same numbers, not as a view
        output = torch.ops.aten._unsafe_view(output, output.shape)
    output.register_hook(lambda delta: take(delta, None))
    return output.clone() if output.is_leaf else output  # a later in-place operation may not touch a leaf


def _is_plain(module: nn.Module) -> bool:
    """Tell whether the output is x Wᵀ + b and nothing else: no other hook has changed it."""
    return type(module) is nn.Linear and len(module._forward_hooks) == 1 and "forward" not in vars(module)


class _Linear(torch.autograd.Function):
    """A Linear's output with the Linear's own way back."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, output: Tensor, weight: Tensor, examples: int, take: Take) -> Tensor:
        ctx.weight, ctx.examples, ctx.take = weight, examples, take
        return torch.ops.aten._unsafe_view(
            output, output.shape
        )  # not a view, which an in-place activation may not change

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        whole = delta.reshape(ctx.examples, -1, delta.shape[-1])
        tokens = tokens_with_gradient(whole)
        part = delta if tokens is None else at_tokens(whole, tokens)
        ctx.take(part, tokens)
        back = part @ ctx.weight if ctx.needs_input_grad[0] else None
        if back is not None and tokens is not None:
            zeros = back.new_zeros(*whole.shape[:2], back.shape[2])
            back = zeros.scatter_(1, tokens.unsqueeze(2).expand_as(back), back).reshape(*delta.shape[:-1], -1)
        return back, None, None, None, None


def tokens_with_gradient(delta: Tensor) -> Tensor | None:
    """Return [B, T'] positions of all tokens with a gradient, T' the most that an example has; None if T' > T / 2.

    None on a GPU, which would have to be waited for.
    """
    if delta.is_cuda or delta.shape[1] < 2 or delta[:, -1, 0].any():
        return None
    return first_tokens(delta.any(2))


def first_tokens(wanted: Tensor) -> Tensor | None:
    """Return [B, T'] positions, those wanted [B, T] in front and in order, T' the most of an example; None if T' > T / 2."""
    most = max(1, int(wanted.sum(1).max()))
    if 2 * most > wanted.shape[1]:
        return None
    return wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]


def at_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """Return [B, T', n]: the vectors [B, T, n] at these positions [B, T']."""
    return values.gather(1, tokens.unsqueeze(2).expand(-1, -1, values.shape[2]))
