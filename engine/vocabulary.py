"""A language model's cross-entropy without the logits of a whole batch.

[tokens, vocabulary] is by far the largest tensor of a language model's pass. While per-example gradients are taken, the
loss, the gradient that goes on to the hidden states, and what is wanted of the head's own gradient are computed from some
examples' logits at a time, which stay in the cache. Where that head is more than one Linear, where its gradient is wanted
whole, and in curvature products, its Linear is given the counted tokens alone: a seventh of a masked language model's.
Everywhere else the model's own logits are used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.taps import at_tokens, first_tokens
from engine.tasks.text import IGNORED, wide

_LOGITS = 1 << 22  # numbers of logits held at a time
_PROBED = 128  # tokens


class HeadGradients(Protocol):
    """Who takes per-example gradients in this pass, and so what is wanted of the head's."""

    def fuses(self, head: nn.Linear, same: Callable[[], bool]) -> bool: ...  # same(): the head makes the model's logits
    def takes(self, head: nn.Linear) -> bool: ...  # whether the head itself is looked at
    def reduce_head(self, head: nn.Linear, delta: Tensor) -> tuple[Tensor, Tensor] | None: ...  # projected, gram
    def add_head(self, head: nn.Linear, hidden: Tensor, reduced: tuple[Tensor, Tensor]) -> None: ...


_TAKING: ContextVar[HeadGradients | None] = ContextVar("_TAKING", default=None)


@contextmanager
def taking(gradients: HeadGradients) -> Iterator[None]:
    """Let the passes inside fuse the head."""
    token = _TAKING.set(gradients)
    try:
        yield
    finally:
        _TAKING.reset(token)


class CountedTokens:
    """Inside, a model's head is given the counted tokens alone, if the model makes the same logits of them then.

    One of these serves one model, whose first pass inside shows whether it does.
    """

    def __init__(self) -> None:
        self._same: bool | None = None
        self._tokens: list[Token] = []

    def __enter__(self) -> None:
        self._tokens.append(_COUNTED.set(self))

    def __exit__(self, *_: object) -> None:
        _COUNTED.reset(self._tokens.pop())

    def look(self, run: Callable[[], object]) -> None:
        """Let a pass that is good for nothing else show it, before passes in which a model may not be called twice."""
        if self._same is None:
            with torch.no_grad(), self:
                run()
            self._same = bool(self._same)

    def suit(self, model: nn.Module, head: nn.Linear, names: list[str]) -> bool:
        if self._same is None:
            self._same = _token_by_token(model, head, names)
        return self._same


_COUNTED: ContextVar[CountedTokens | None] = ContextVar("_COUNTED", default=None)


def token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return [B, T]: −log p of every label given the logits at its place; 0 where the label is IGNORED.

    float32, or float64 of a model in float64.
    """
    gradients, head = _TAKING.get(), _plain_head(model)
    if gradients and head and gradients.fuses(head, lambda: _makes_the_logits(model, head, list(inputs))):
        hidden = model.base_model(**inputs)[0]  # type: ignore[operator]
        if not hidden.requires_grad and gradients.takes(head):
            hidden = hidden.detach().requires_grad_()  # nothing below the head is looked at
        return _FusedHead.apply(hidden, head, labels, gradients)
    counted = _COUNTED.get()
    fewer = bool(counted and head and counted.suit(model, head, list(inputs)))
    places = first_tokens(labels != IGNORED) if fewer else None
    if head and places is not None:
        each = _losses(_logits_at(model, head, inputs, places), labels.gather(1, places))
        return each.new_zeros(labels.shape).scatter(1, places, each)
    return _losses(model(**inputs).logits, labels)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    counted = labels != IGNORED
    each = F.cross_entropy(wide(logits[counted]), labels[counted], reduction="none")
    return each.new_zeros(labels.shape).masked_scatter(counted, each)


def _logits_at(model: nn.Module, head: nn.Linear, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    """Return the model's logits [B, K, V] at tokens [B, K]; its head sees no other."""
    handle = head.register_forward_pre_hook(lambda _, args: (at_tokens(args[0], places), *args[1:]) if args else None)
    try:
        return model(**inputs).logits
    finally:
        handle.remove()


def _plain_head(model: nn.Module) -> nn.Linear | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return head if type(head) is nn.Linear and getattr(model, "base_model", model) is not model else None


def _makes_the_logits(model: nn.Module, head: nn.Linear, names: list[str]) -> bool:
    """Tell whether the logits are the head's output on the last hidden state, to the bit, with nothing done to either.

    The head's output is made a thousand times larger on the way: a cap that leaves small logits alone is seen then.
    """
    probe = _probe(model, head, names)
    with torch.no_grad():
        hidden = model.base_model(**probe)[0]  # type: ignore[operator]
    logits, calls = _through(model, head, probe, lambda out: out * 1024)
    return len(calls) == 1 and torch.equal(calls[0][0], hidden) and _equal(logits, calls[0][1] * 1024)


def _token_by_token(model: nn.Module, head: nn.Linear, names: list[str]) -> bool:
    """Tell whether the head sees [B, T, H] once, and each token's logits are made of what it gives for that token alone."""
    probe = _probe(model, head, names)
    logits, calls = _through(model, head, probe, lambda out: out)
    shape = probe[names[0]].shape
    if len(calls) != 1 or calls[0][0].shape[:2] != shape or logits.shape[:2] != shape:
        return False
    some = torch.arange(shape[1] - 1, -1, -2, device=logits.device)[None]  # every other one, the last first
    try:
        fewer, _ = _through(model, head, probe, lambda out: at_tokens(out, some))
    except (IndexError, RuntimeError, ValueError):  # what follows the head needs all tokens
        return False
    return _equal(fewer, at_tokens(logits, some), 4 * torch.finfo(logits.dtype).eps)


def _probe(model: nn.Module, head: nn.Linear, names: list[str]) -> dict[str, Tensor]:
    """Return an example that hangs on no batch, so that all workers learn the same of a model; long, to show chunks."""
    known = [getattr(model.config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits = [limit for limit in known if isinstance(limit, int) and limit > 0]
    ones = torch.ones(
        1, max(4, min([_PROBED, *(limit - 4 for limit in limits)])), dtype=torch.int64, device=head.weight.device
    )
    return {name: ones.cumsum(1) % head.out_features if name == "input_ids" else ones for name in names}


def _through(
    model: nn.Module, head: nn.Linear, inputs: dict[str, Tensor], change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the logits with the head's output changed, and the head's input and own output at every call."""
    calls: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        calls.append((args[0] if args else next(iter(kwargs.values())), out))
        return change(out)

    handle = head.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            return model(**inputs).logits, calls
    finally:
        handle.remove()


def _equal(logits: Tensor, others: Tensor, relative: float = 0.0) -> bool:
    """Tell whether all logits are the same, up to so much of each."""
    same = logits.shape == others.shape
    return same and torch.allclose(logits, others.to(logits.dtype), rtol=relative, atol=0, equal_nan=True)


class _FusedHead(torch.autograd.Function):
    """Losses forward, with everything that the backward pass needs made on the way and the logits dropped."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, labels: Tensor, gradients: HeadGradients) -> Tensor:
        losses, toward_hidden, reduced = [], [], []
        step = max(1, _LOGITS // (labels.shape[1] * head.out_features))
        for begin in range(0, len(labels), step):
            some = slice(begin, begin + step)
            each, delta = _loss_and_gradient(F.linear(hidden[some], head.weight, head.bias), labels[some])
            losses.append(each)
            toward_hidden.append(delta @ head.weight)
            reduced.append(gradients.reduce_head(head, delta))
        ctx.head, ctx.gradients = head, gradients
        ctx.reduced = None if reduced[0] is None else [torch.cat(parts) for parts in zip(*reduced, strict=True)]
        ctx.save_for_backward(hidden, torch.cat(toward_hidden))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, toward_hidden = ctx.saved_tensors
        if ctx.reduced is not None:
            projected, gram = ctx.reduced
            each = weight.unsqueeze(-1)
            gram = gram * each * each.transpose(1, 2) if gram.numel() else gram
            ctx.gradients.add_head(ctx.head, hidden.detach(), (projected * each, gram))
        return toward_hidden * weight.unsqueeze(-1).to(toward_hidden.dtype), None, None, None


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [B, T] and softmax − one-hot, [B, T, V], in the logits' precision; both 0 where ignored."""
    dtype, logits = logits.dtype, wide(logits)
    counted = labels != IGNORED
    target = labels.clamp(min=0).unsqueeze(-1)
    total = logits.logsumexp(-1, keepdim=True)
    losses = (total - logits.gather(-1, target)).squeeze(-1) * counted
    delta = logits.sub_(total).exp_()
    delta.scatter_add_(-1, target, -torch.ones_like(total))
    delta *= counted.unsqueeze(-1)
    return losses, delta.to(dtype)
