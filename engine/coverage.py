"""How much of the true gradient the captured parameters carry, measured against autograd on a sample.

The hooks are held against autograd too: a weight that a model also reads outside its module's call is found here.
"""

from collections.abc import Callable
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


def measure_coverage(
    model: nn.Module,
    parameters: list[Parameter],
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: list[Batch],  # one example each
    among: set[str] | None = None,  # names that training moved; None: every parameter
) -> Coverage:
    """Return the share of the squared gradient norm that the chosen parameters carry.

    The truth is one plain backward pass per example over all weights, without any hook. Cost: two full backwards each.
    Raises ValueError for a chosen parameter whose gradient by hooks differs from it.
    """
    hooked = _hooked_squares(model, parameters, loss, batches)
    named = {n: w for n, w in model.named_parameters() if w.is_floating_point() and (among is None or n in among)}
    captured = {p.name for p in parameters}
    squares = dict.fromkeys(named, 0.0)
    weights = list(named.values())
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in batches:
            total = loss(model, batch).sum()
            for name, grad in zip(named, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
                squares[name] += 0.0 if grad is None else float(grad.double().square().sum())
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    _refuse_missed_uses(hooked, squares)
    whole = sum(squares.values())
    if whole == 0:
        return Coverage(1.0, (), len(batches))
    others = sorted(((s / whole, n) for n, s in squares.items() if n not in captured and s > 0), reverse=True)
    share = sum(s for n, s in squares.items() if n in captured) / whole
    return Coverage(share, tuple((n, s) for s, n in others[:5]), len(batches))


def _hooked_squares(
    model: nn.Module, parameters: list[Parameter], loss: Callable[[nn.Module, Batch], Tensor], batches: list[Batch]
) -> dict[str, float]:
    """Return Σ‖∇‖² of every chosen parameter as the hooks see it."""
    with PerExampleGradients(model, parameters, Whole(parameters, stored=False)) as gradients:
        squares = dict.fromkeys((p.name for p in parameters), 0.0)
        for batch in batches:
            for name, array in gradients(loss, batch).arrays.items():
                squares[name] += float(array.double().square().sum())
    return squares


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
