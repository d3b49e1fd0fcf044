"""How much of the true gradient the captured parameters carry, measured against autograd on a sample.

The hooks are held against autograd too: a weight that a model also reads outside its module's call is found here.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.gradients import PerExampleGradients
from engine.parameters import Parameter
from engine.projectors import Whole

_TOLERANCE = 0.05  # of a parameter's gradient norm: bfloat16 stays below, a missed use does not
_ROUNDING = 1e-3  # of the whole norm: gradients that are zero but for rounding, such as an attention key's bias


@dataclass(frozen=True)
class Coverage:
    """Shares of Σ‖∇‖² over the sampled examples."""

    share: float  # carried by the captured parameters
    missing: tuple[tuple[str, float], ...]  # the largest others, with their shares
    examples: int
    silent: tuple[str, ...] = ()  # captured parameters whose gradient is zero on every sampled example


def measure_coverage(
    model: nn.Module,
    parameters: list[Parameter],
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: list[Batch],  # one example each
    among: set[str] | None = None,  # names that training moved; None: every parameter
) -> Coverage:
    """Return the share of the squared gradient norm that the chosen parameters carry.

    The truth is one plain backward pass per example over all weights, without any hook. Cost: two full backwards each.
    Examples that are not finite are left out.
    Raises ValueError for a chosen parameter whose gradient by hooks differs from it.
    """
    named = {n: w for n, w in model.named_parameters() if w.is_floating_point() and (among is None or n in among)}
    captured = {p.name for p in parameters}
    by_hooks = list(_hooked_squares(model, parameters, loss, batches))
    pairs = zip(by_hooks, _true_squares(model, named, loss, batches), strict=True)
    finite = [(hooked, true) for hooked, true in pairs if all(map(math.isfinite, [*hooked.values(), *true.values()]))]
    hooked, squares = (_summed(part) for part in zip(*finite, strict=True)) if finite else ({}, {})
    _refuse_missed_uses(hooked, squares)
    whole = sum(squares.values())
    if whole == 0:
        return Coverage(1.0, (), len(finite), tuple(hooked))
    others = sorted(((s / whole, n) for n, s in squares.items() if n not in captured and s > 0), reverse=True)
    share = sum(s for n, s in squares.items() if n in captured) / whole
    silent = tuple(name for name, square in hooked.items() if square == 0)
    return Coverage(share, tuple((n, s) for s, n in others[:5]), len(finite), silent)


def why_alone(
    model: nn.Module, parameters: list[Parameter], loss: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> str | None:
    """Return why the examples of a batch have to be run one at a time, None if they may share it."""
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False)) as gradients:
        return gradients.why_alone(loss, batch) if len(batch) > 1 else None


def _summed(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _true_squares(
    model: nn.Module, named: Mapping[str, Tensor], loss: Callable[[nn.Module, Batch], Tensor], batches: list[Batch]
) -> Iterator[dict[str, float]]:
    """Yield, for every batch, ‖∇‖² of every named weight by one plain backward pass."""
    weights = list(named.values())
    for batch in batches:
        for weight in weights:
            weight.requires_grad_(True)
        try:
            grads = torch.autograd.grad(loss(model, batch).sum(), weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        squares = [0.0 if grad is None else float(grad.double().square().sum()) for grad in grads]
        yield dict(zip(named, squares, strict=True))


def _hooked_squares(
    model: nn.Module, parameters: list[Parameter], loss: Callable[[nn.Module, Batch], Tensor], batches: list[Batch]
) -> Iterator[dict[str, float]]:
    """Yield, for every batch, ‖∇‖² of every chosen parameter as the hooks see it."""
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False)) as gradients:
        for batch in batches:
            arrays = gradients(loss, batch).arrays
            yield {name: float(array.double().square().sum()) for name, array in arrays.items()}


def _refuse_missed_uses(hooked: dict[str, float], truth: dict[str, float]) -> None:
    """Raise ValueError for a parameter whose gradient norm by hooks is not the true one; mere rounding is let pass."""
    whole = sum(truth.values()) ** 0.5
    for name in hooked.keys() & truth.keys():
        seen, true = hooked[name] ** 0.5, truth[name] ** 0.5
        if abs(seen - true) > _TOLERANCE * true + _ROUNDING * whole:
            raise ValueError(
                f"the gradient of {name} has norm {seen:.4g} by hooks, {true:.4g} by autograd: the model also uses it "
                f"outside its module's call. Leave it out of gradients.modules."
            )
