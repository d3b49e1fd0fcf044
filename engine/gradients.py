"""Per-example gradients from one forward and one activation-only backward pass, by hooks.

Every weight is frozen. The graph starts at the outputs of the lowest modules looked at, so no weight gradient and nothing
below them is ever computed. A module that takes x_t and whose output receives δ_t has the gradient Σ_t δ_t x_tᵀ per
example; its two factors are projected inside the hooks and multiplied at once, so no gradient of full size is made unless
it is asked for. Exact norms come from the unprojected factors of the same pass, never from a sketch.

Examples share a batch as long as every module keeps one in each row of its input. Where one does not (an expert sees the
tokens routed to it), and for fused experts, whose gradient autograd takes itself, each example is run alone.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from engine import convolution, routed, vocabulary
from engine.batches import Batch
from engine.factors import Factor, squared_norm
from engine.gradient_batch import GradientBatch, check_losses, joined
from engine.norms import CHANNELS_SECOND, normalised
from engine.parameters import Parameter, Use
from engine.projectors import Projector, Sums, TwoSided
from engine.taps import at_tokens, tapped
from engine.tasks.text import wide


@dataclass
class _Call:
    """The factors of one use of one parameter in one forward pass."""

    parameter: int
    output: Factor
    input: Factor


class PerExampleGradients:
    """Hooks on a model that turn a loss into per-example gradient rows. Use as a context manager: leaving removes them."""

    def __init__(
        self, model: nn.Module, parameters: list[Parameter], projector: Projector, norms: bool = False
    ) -> None:
        self.model, self.parameters, self.projector, self.norms = model, parameters, projector, norms
        for weight in model.parameters():
            weight.requires_grad_(False)
        modules = dict(model.named_modules())
        weights = dict(model.named_parameters())
        self._fused = [(i, weights[p.name]) for i, p in enumerate(parameters) if p.is_fused]
        uses: dict[str, list[tuple[int, Use]]] = {}
        for index, parameter in enumerate(parameters):
            for use in () if parameter.is_fused else parameter.uses:
                uses.setdefault(use.module, []).append((index, use))
        self._hooked = {name: modules[name] for name in uses}
        self._places: dict[str, routed.Place] = {}  # not known before the first batch of several examples
        self._batches = 0  # of several examples, so far
        self._warned = False
        self._handles = [
            modules[name].register_forward_hook(partial(self._forward, name, here), with_kwargs=True)
            for name, here in uses.items()
        ]
        self._uses = {modules[name]: here for name, here in uses.items()}
        self._fusing: bool | None = None  # whether a vocabulary head is fused; looked at in the first pass over one
        self._counted = vocabulary.CountedTokens()
        self._batch_size = 0
        self._calls: dict[int, int] = {}
        self._pending: dict[int, list[_Call]] = {}
        self._sums: Sums = {}
        self._squares: Tensor | None = None
        self._last: tuple[Tensor, int, Factor] | None = None

    def __enter__(self) -> "PerExampleGradients":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> GradientBatch:
        """Return rows, losses and (if asked for) exact norms of every example of the batch.

        `loss` gives [B]. Raises ValueError if it does not, or if no chosen module takes part in it. Warns once if the
        examples have to be run one at a time.
        """
        if len(batch) == 1:
            return self._alone(loss, batch)
        reason = self.why_alone(loss, batch)
        if reason is None:
            try:
                return self._pass(loss, batch)
            except routed.MixedRows as found:
                self._look(loss, batch, str(found))
                return self(loss, batch)
            except torch.OutOfMemoryError:
                pass  # again outside, where what the failed pass held has gone
            return self._halved(loss, batch)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{reason}: every example is run alone, which is slower", stacklevel=2)
        return joined([self._alone(loss, batch.take([i])) for i in range(len(batch))])

    def _alone(self, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> GradientBatch:
        try:
            return self._pass(loss, batch)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"example {int(batch.ids[0])} alone does not fit in the device's memory: cut examples shorter (the "
                f"task's max_tokens), look at fewer modules, or use gradients.compute=bfloat16. {error}"
            ) from error

    def _halved(self, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> GradientBatch:
        """Return the same from two batches of half the size: the device's memory does not hold this one."""
        self._sums, self._pending, self._squares = {}, {}, None
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        halves = [batch.take(list(part)) for part in (range(middle), range(middle, len(batch)))]
        return joined([self(loss, half) for half in halves])

    def why_alone(self, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> str | None:
        """Return why examples cannot share a batch, None if they can.

        Looked at on the first batch of several, and again on the second, fourth, eighth …: another may show more.
        """
        if self._fused:
            return f"{self.parameters[self._fused[0][0]].name} holds several experts"
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:
            self._look(loss, batch)
        mixed = [name for name, place in self._places.items() if place == "mixed"]
        return f"module {mixed[0]} does not keep one example in each row of its input" if mixed else None

    def _look(self, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch, unlike: str = "") -> None:
        """Find where the modules keep the examples; `unlike`: one that is new, or has just been seen to be otherwise."""
        before = self._places
        found = routed.places(self._hooked, lambda some: loss(self.model, some), batch)
        changed = {name for name in found.keys() & before.keys() if found[name] != before[name]}
        self._places = before | found | dict.fromkeys(changed, "mixed")
        if unlike and (unlike in before or unlike not in found):
            self._places[unlike] = "mixed"

    def _pass(self, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> GradientBatch:
        """Return what one forward and one backward pass over the batch give."""
        self._batch_size, self._calls, self._pending = len(batch), {}, {}
        self._sums, self._squares = {}, None
        try:
            fused: list[Tensor] = [weight for _, weight in self._fused]
            with torch.enable_grad(), _taking_gradients(fused), vocabulary.taking(self), self._counted:
                losses = loss(self.model, batch)
                check_losses(losses, len(batch))
                like = self._like(losses)
                if self.norms:
                    self._squares = like.new_zeros(len(batch), len(self.parameters))
                if losses.requires_grad:
                    losses.sum().backward()
                elif len(batch) > 1:  # one example may pass by all of the chosen experts
                    raise ValueError("the loss does not depend on any of the chosen modules: check gradients.modules")
                for index, weight in self._fused:
                    self._take(index, weight)
        finally:
            self._batch_size, self._last = 0, None  # until the next call the hooks do nothing
        for index in list(self._pending):
            self._square(index)  # a call whose output the loss does not use has sent nothing back
        norms = None if self._squares is None else self._squares.clamp(min=0).sqrt()
        arrays, self._sums = self.projector.arrays(self._sums, like), {}
        return GradientBatch(batch.ids, losses.detach().double(), arrays, norms)

    def _like(self, losses: Tensor) -> Tensor:
        """Return a tensor of as many rows in the precision of what is kept: float32, or the model's float64."""
        double = next(self.model.parameters()).dtype == torch.float64
        return losses.new_empty(len(losses), dtype=torch.float64 if double else torch.float32)

    def _forward(
        self, name: str, uses: list[tuple[int, Use]], module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor:
        """Remember the input factor and ask for the output's gradient; start the graph here if none has started."""
        if not self._batch_size or not torch.is_grad_enabled():
            return output
        output = self._per_example(name, output)
        inner = self._per_example(name, routed.first_input(args, kwargs))
        for index, _ in uses:
            self._calls[index] = self._calls.get(index, 0) + 1
        with torch.no_grad():
            kept = [(index, use, self._input(index, use, module, inner)) for index, use in uses]
        versions = [_tensor(held)._version for _, _, held in kept]
        take = partial(self._backward, name, module, kept, versions)
        return tapped(module, inner, output, self._batch_size, take)

    def _input(self, index: int, use: Use, module: nn.Module, inner: Tensor) -> Factor | Tensor:
        """Return what the backward hook needs of the module's input: exact norms need all of it, rows the projection."""
        if use.role in ("linear", "conv1d"):
            whole = self._input_factor(inner)
            return whole if self.norms else self.projector.reduce_input(self.parameters[index], whole)
        if use.role in ("embedding", "embedding-transposed"):
            return Factor(inner.reshape(self._batch_size, -1), int(module.num_embeddings))  # type: ignore[arg-type]
        if use.role == "convolution":
            return self._patches(index, cast(nn.Conv2d, module), inner.detach())
        return inner.detach() if use.role == "scale" else inner.new_empty(0)  # a bias needs none of it

    def _input_factor(self, inner: Tensor) -> Factor:
        """Return the input as a factor: the same one for modules that read the same tensor one after the other."""
        if self._last is None or self._last[0] is not inner or self._last[1] != inner._version:
            factor = Factor(inner.detach().reshape(self._batch_size, -1, inner.shape[-1]))
            self._last = inner, inner._version, factor
        return self._last[2]

    def _patches(self, index: int, module: nn.Conv2d, inner: Tensor) -> Factor | Tensor:
        """Return the projected patches; the input itself where they are needed whole, as they are many times larger."""
        if self.norms or module.groups > 1:
            return inner
        found = convolution.patches(module, inner).squeeze(2)
        whole = Factor(found.reshape(self._batch_size, -1, found.shape[-1]))
        return self.projector.reduce_input(self.parameters[index], whole)

    def _backward(
        self, name: str, module: nn.Module, kept: list[tuple[int, Use, Factor | Tensor]], versions: list[int],
        delta: Tensor, tokens: Tensor | None,
    ) -> None:  # fmt: skip
        """Multiply the two factors of every use into the rows, and into the squared norms."""
        if versions != [_tensor(held)._version for _, _, held in kept]:
            # frozen weights keep autograd from saving the input, and so from checking it
            raise ValueError(
                f"the input of module {name} was changed in place after the module had read it, so its gradient cannot "
                f"be taken. Use the operation that is not in place, or leave it out of gradients.modules."
            )
        for index, use, held in kept:
            if use.role in ("bias", "scale"):
                gradient = _vector_gradient(use.role, module, held, delta)
                self._vector(index, gradient.reshape(self._batch_size, -1, gradient.shape[-1]).sum(1))
            else:
                if tokens is not None:
                    held = Factor(at_tokens(_tensor(held), tokens))
                call = _matrix_factors(index, use, module, held, delta)
                self._matrix(index, _Call(index, self._folded(call.output), self._folded(call.input)))

    def _vector(self, index: int, gradient: Tensor) -> None:
        self.projector.add_vector(self._sums, self.parameters[index], gradient)
        if self._squares is not None:
            if self._calls[index] > 1:
                self._pool(
                    index, _Call(index, Factor(gradient.unsqueeze(1)), Factor(gradient.new_ones(len(gradient), 1, 1)))
                )
            else:
                self._squares[:, index] = gradient.to(self._squares.dtype).square().sum(1)

    def _matrix(self, index: int, call: _Call) -> None:
        self.projector.add_matrix(self._sums, self.parameters[index], call.output, call.input)
        if self._squares is not None:
            self._pool(index, call)

    def fuses(self, head: nn.Linear, same: Callable[[], bool]) -> bool:
        """Tell whether the head's loss and gradients are taken without all logits: if what is kept of them is small."""
        if self._fusing is None:
            uses = self._uses.get(head, [])
            kept = not uses or (isinstance(self.projector, TwoSided) and [use.role for _, use in uses] == ["linear"])
            alone = not self.norms or all(len(self.parameters[index].uses) == 1 for index, _ in uses)
            self._fusing = kept and alone and same()
        return self._fusing

    def takes(self, head: nn.Linear) -> bool:
        """Tell whether the head is one of the modules looked at."""
        return head in self._uses

    def reduce_head(self, head: nn.Linear, delta: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the projected output factor [b, T, k], and its Gram matrices [b, T, T] if norms need them."""
        for index, _ in self._uses.get(head, []):
            assert isinstance(self.projector, TwoSided)
            factor = Factor(delta)
            products = factor.gram if self.norms else delta.new_empty(len(delta), 0, 0)
            return self.projector.reduce_output(self.parameters[index], factor).values, products
        return None

    def add_head(self, head: nn.Linear, hidden: Tensor, reduced: tuple[Tensor, Tensor]) -> None:
        """Add the head's part to the rows and the squared norms."""
        projected, products = reduced
        ((index, _),) = self._uses[head]
        inner = Factor(hidden)
        self.projector.add_matrix(self._sums, self.parameters[index], Factor(projected), inner)
        if self._squares is not None:
            self._squares[:, index] = (wide(products) * wide(inner.gram)).sum((1, 2))

    def _folded(self, factor: Factor) -> Factor:
        """Return the factor with all rows as tokens of the one example, if it is run alone."""
        if factor.values.shape[0] == self._batch_size:
            return factor
        return Factor(factor.values.flatten(0, 1).unsqueeze(0), factor.one_hot)

    def _take(self, index: int, weight: Tensor) -> None:
        """Add the gradient that autograd left at a weight: all of it is the one example's."""
        assert self._batch_size == 1
        parameter = self.parameters[index]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if parameter.is_vector:
            self.projector.add_vector(self._sums, parameter, gradient.unsqueeze(0))
        else:
            rows = gradient.reshape(1, parameter.out_features, parameter.in_features)
            self.projector.add_matrix(self._sums, parameter, *convolution.whole_factors(rows))
        if self._squares is not None:
            self._squares[:, index] = gradient.to(self._squares.dtype).square().sum()

    def _pool(self, index: int, call: _Call) -> None:
        """Take the norm once all calls of this parameter are there: their cross terms count too."""
        calls = self._pending.setdefault(index, [])
        calls.append(call)
        if len(calls) == self._calls[index]:
            self._square(index)

    def _square(self, index: int) -> None:
        assert self._squares is not None
        pairs = [(c.output, c.input) for c in self._pending.pop(index)]
        self._squares[:, index] = squared_norm(pairs).to(self._squares.dtype)

    def _per_example(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor with the examples along its first dimension; a shared one (positions [1, T]) is spread out."""
        place = self._places.get(name)
        if self._batch_size == 1 or (place == "row" and tensor.shape[0] == self._batch_size):
            return tensor
        if place == "shared" and tensor.shape[0] == 1:
            return tensor.expand(self._batch_size, *tensor.shape[1:])
        raise routed.MixedRows(name)


@contextmanager
def _taking_gradients(weights: list[Tensor]) -> Iterator[None]:
    """Let autograd leave the gradients of these weights at them, and clear them away."""
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _tensor(held: Factor | Tensor) -> Tensor:
    return held.values if isinstance(held, Factor) else held


def _vector_gradient(role: str, module: nn.Module, inner: Factor | Tensor, delta: Tensor) -> Tensor:
    """Return Σ_t δ_t (a bias) or Σ_t δ_t ⊙ x̂_t (the scale of a normalisation), a row for each of the input."""
    if role == "scale":
        assert isinstance(inner, Tensor)
        delta = delta * normalised(module, inner)
    if isinstance(module, convolution.CONVOLUTIONS):
        return convolution.output_tokens(module, delta).sum(1)
    if isinstance(module, CHANNELS_SECOND):
        return delta.flatten(2).sum(2) if delta.dim() > 2 else delta
    return delta.flatten(1, -2).sum(1) if delta.dim() > 2 else delta


def _matrix_factors(index: int, use: Use, module: nn.Module, held: Factor | Tensor, delta: Tensor) -> _Call:
    """Return the factors (output side, input side) of one call in the parameter's (O, I) orientation."""
    if isinstance(module, convolution.CONVOLUTIONS):
        return _Call(index, *convolution.factors(module, held, delta))
    assert isinstance(held, Factor)
    delta = delta.reshape(held.values.shape[0], -1, delta.shape[-1])
    if use.role in ("linear", "conv1d"):
        return _Call(index, Factor(delta), held)
    if module.padding_idx is not None:
        delta = delta * (held.values != cast(int, module.padding_idx)).unsqueeze(-1)
    gradient = Factor(delta)
    return _Call(index, held, gradient) if use.role == "embedding-transposed" else _Call(index, gradient, held)
