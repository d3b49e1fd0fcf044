"""Per-example gradients from one forward and one activation-only backward pass, by hooks.

Every weight is frozen. The graph starts at the outputs of the lowest modules looked at, so no weight gradient and nothing
below them is ever computed. A module that takes x_t and whose output receives δ_t has the gradient Σ_t δ_t x_tᵀ per
example; its two factors are projected inside the hooks and multiplied at once, so no gradient of full size is made unless
it is asked for. Exact norms come from the unprojected factors of the same pass, never from a sketch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch
from engine.factors import Factor, squared_norm
from engine.parameters import Parameter, Use
from engine.projection import RowLayout
from engine.projectors import Projector


@dataclass(frozen=True)
class GradientBatch:
    """What one pass over B examples gives, in the batch's order."""

    ids: Tensor  # int64 [B]
    losses: Tensor  # float64 [B]
    arrays: dict[str, Tensor]  # name -> float32 (or the model's wider dtype) [B, columns]
    norms: Tensor | None  # [B, parameters], exact ‖∇‖₂ of each parameter; None if not asked for


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
        uses: dict[str, list[tuple[int, Use]]] = {}
        for index, parameter in enumerate(parameters):
            for use in parameter.uses:
                uses.setdefault(use.module, []).append((index, use))
        self._handles = [
            modules[name].register_forward_hook(partial(self._forward, name, here), with_kwargs=True)
            for name, here in uses.items()
        ]
        self._batch_size = 0
        self._calls: dict[int, int] = {}
        self._pending: dict[int, list[_Call]] = {}

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

        `loss` gives [B]. Raises ValueError if it does not, or if no chosen module takes part in it.
        """
        self._batch_size, self._calls, self._pending = len(batch), {}, {}
        self._arrays: dict[str, Tensor] = {}
        self._squares: Tensor | None = None
        try:
            with torch.enable_grad():
                losses = loss(self.model, batch)
                check_losses(losses, len(batch))
                if not losses.requires_grad:
                    raise ValueError("the loss does not depend on any of the chosen modules: check gradients.modules")
                self._start(losses)
                losses.sum().backward()
        finally:
            self._batch_size = 0  # until the next call the hooks do nothing
        for index in list(self._pending):
            self._square(index)  # a call whose output the loss does not use has sent nothing back
        norms = None if self._squares is None else self._squares.clamp(min=0).sqrt()
        return GradientBatch(batch.ids, losses.detach().double(), self._arrays, norms)

    def _start(self, losses: Tensor) -> None:
        wide = torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32
        self._arrays = {
            name: torch.zeros(len(losses), width, dtype=wide, device=losses.device)
            for name, width in self.projector.layout.arrays.items()
        }
        if self.norms:
            self._squares = torch.zeros(len(losses), len(self.parameters), dtype=wide, device=losses.device)

    def _forward(
        self, name: str, uses: list[tuple[int, Use]], module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor:
        """Remember the input factor and ask for the output's gradient; start the graph here if none has started."""
        if not self._batch_size or not torch.is_grad_enabled():
            return output
        output = self._per_example(name, output)
        inner = self._per_example(name, args[0] if args else next(iter(kwargs.values())))
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        elif output._is_view():
            # an in-place activation after it would take a view's hook off the graph: the same numbers, not as a view
            output = torch.ops.aten._unsafe_view(output, output.shape)
        for index, _ in uses:
            self._calls[index] = self._calls.get(index, 0) + 1
        with torch.no_grad():
            kept = [(index, use, self._input(index, use, module, inner)) for index, use in uses]
        versions = [_tensor(held)._version for _, _, held in kept]
        output.register_hook(partial(self._backward, name, module, kept, versions))
        return output.clone() if output.is_leaf else output  # a later in-place operation may not touch a leaf

    def _input(self, index: int, use: Use, module: nn.Module, inner: Tensor) -> Factor | Tensor:
        """Return what the backward hook needs of the module's input: exact norms need all of it, rows the projection."""
        if use.role in ("linear", "conv1d"):
            whole = Factor(inner.detach().flatten(1, -2) if inner.dim() > 2 else inner.detach().unsqueeze(1))
            return whole if self.norms else self.projector.reduce_input(self.parameters[index], whole)
        if use.role in ("embedding", "embedding-transposed"):
            return Factor(inner.flatten(1), int(module.num_embeddings))  # type: ignore[arg-type]
        return inner.detach() if use.role == "scale" else inner.new_empty(0)  # a bias needs none of it

    def _backward(
        self, name: str, module: nn.Module, kept: list[tuple[int, Use, Factor | Tensor]], versions: list[int], delta: Tensor
    ) -> None:  # fmt: skip
        """Multiply the two factors of every use into the rows, and into the squared norms."""
        if versions != [_tensor(held)._version for _, _, held in kept]:
            # frozen weights keep autograd from saving the input, and so from checking it
            raise ValueError(
                f"the input of module {name} was changed in place after the module had read it, so its gradient cannot "
                f"be taken. Use the operation that is not in place, or leave it out of gradients.modules."
            )
        with torch.no_grad():
            for index, use, held in kept:
                if use.role in ("bias", "scale"):
                    self._vector(index, _vector_gradient(use.role, module, held, delta))
                else:
                    self._matrix(index, _matrix_factors(index, use, module, held, delta))

    def _vector(self, index: int, gradient: Tensor) -> None:
        self.projector.add_vector(self._arrays, self.parameters[index], gradient)
        if self._squares is not None:
            if self._calls[index] > 1:
                self._pool(
                    index, _Call(index, Factor(gradient.unsqueeze(1)), Factor(gradient.new_ones(len(gradient), 1, 1)))
                )
            else:
                self._squares[:, index] = gradient.to(self._squares.dtype).square().sum(1)

    def _matrix(self, index: int, call: _Call) -> None:
        self.projector.add_matrix(self._arrays, self.parameters[index], call.output, call.input)
        if self._squares is not None:
            self._pool(index, call)

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
        if tensor.shape[0] == self._batch_size:
            return tensor
        if tensor.shape[0] == 1:
            return tensor.expand(self._batch_size, *tensor.shape[1:])
        raise ValueError(
            f"module {name} has first dimension {tensor.shape[0]} in a batch of {self._batch_size} examples: per-example "
            f"gradients need the examples along the first dimension. Leave it out of gradients.modules."
        )


def _tensor(held: Factor | Tensor) -> Tensor:
    return held.values if isinstance(held, Factor) else held


def _vector_gradient(role: str, module: nn.Module, inner: Factor | Tensor, delta: Tensor) -> Tensor:
    """Return Σ_t δ_t (a bias) or Σ_t δ_t ⊙ x̂_t (the scale of a normalisation), [B, O]."""
    if role == "scale":
        assert isinstance(inner, Tensor)
        delta = delta * _normalised(module, inner)
    return delta.reshape(delta.shape[0], -1, delta.shape[-1]).sum(1)


def _normalised(module: nn.Module, inner: Tensor) -> Tensor:
    shape = list(module.normalized_shape)  # type: ignore[arg-type]
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(inner, shape, eps=module.eps)
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(inner, shape, eps=module.eps)


def _matrix_factors(index: int, use: Use, module: nn.Module, held: Factor | Tensor, delta: Tensor) -> _Call:
    """Return the factors (output side, input side) of one call in the parameter's (O, I) orientation."""
    assert isinstance(held, Factor)
    delta = delta.reshape(delta.shape[0], -1, delta.shape[-1])
    if use.role in ("linear", "conv1d"):
        return _Call(index, Factor(delta), held)
    if module.padding_idx is not None:
        delta = delta * (held.values != cast(int, module.padding_idx)).unsqueeze(-1)
    gradient = Factor(delta)
    return _Call(index, held, gradient) if use.role == "embedding-transposed" else _Call(index, gradient, held)


def check_losses(losses: Tensor, size: int) -> None:
    """Raise ValueError unless the loss gave one number per example."""
    if losses.shape != (size,):
        raise ValueError(
            f"the task's loss returned shape {tuple(losses.shape)} for {size} examples: it must return one loss per "
            f"example, shape ({size},), summed over the example's tokens and never over the batch."
        )


def nonfinite(batch: GradientBatch, layout: RowLayout) -> dict[int, str]:
    """Return, for every example with a NaN or infinity, its position and where: the loss or the first such parameter."""
    found: dict[int, str] = {}
    for position in torch.nonzero(~torch.isfinite(batch.losses)).flatten().tolist():
        found[position] = "the loss"
    for name, array in batch.arrays.items():
        for position in torch.nonzero(~torch.isfinite(array).all(1)).flatten().tolist():
            bad = torch.nonzero(~torch.isfinite(array[position])).flatten()[0].item()
            here = next((r.parameter for r in layout.ranges if r.array == name and r.start <= bad < r.stop), name)
            found.setdefault(position, "the gradient" if here == "*" else f"the gradient of {here}")
    if batch.norms is not None:  # too large for its square, though not for itself
        for position in torch.nonzero(~torch.isfinite(batch.norms).all(1)).flatten().tolist():
            found.setdefault(position, "the norm of the gradient")
    return found
