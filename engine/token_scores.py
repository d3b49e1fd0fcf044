"""What each token of an example contributes to its score; the contributions add up to the score.

An example's loss is a sum over tokens, so its score is one too: ⟨R Σ_t ∇ℓ_t, q⟩ = Σ_t ⟨∇ℓ_t, Rᵀq⟩ for a projection R and a
query's row q. ⟨∇ℓ_t, v⟩ is the derivative of ℓ_t along v: one forward-mode pass (Pearlmutter 1994) gives it for all tokens,
where gradients would take one backward pass a token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine import forward_mode
from engine.batches import Batch
from engine.parameters import Parameter
from engine.projection import Projection, RowLayout, dense_matrix, side_matrix

TokenLosses = Callable[[nn.Module, Batch], Tensor]  # [B, T]


def back_projected(
    row: dict[str, Tensor],  # name -> [columns], one query's row
    layout: RowLayout,
    parameters: list[Parameter],
    projection: Projection,
    like: Tensor,  # device and dtype of the result
) -> dict[str, Tensor]:
    """Return Rᵀq by parameter, (O, I) or (O,): the direction whose product with a gradient is that of the two rows."""
    row = {name: values.to(like) for name, values in row.items()}
    found = {}
    for p in parameters:
        shape = (p.out_features,) if p.is_vector else (p.out_features, p.in_features)
        if projection.kind == "none":
            found[p.name] = row[p.name].reshape(shape)
        elif projection.kind == "two-sided":
            found[p.name] = _two_sided(row, layout, p, projection).reshape(shape)
        else:
            found[p.name] = (dense_matrix(projection, p).to(like).T @ row["rows"]).reshape(shape)
    return found


def _two_sided(row: dict[str, Tensor], layout: RowLayout, p: Parameter, projection: Projection) -> Tensor:
    """Return G₁ᵀ Q G₂ for the parameter's block Q of the row."""
    here = layout.of(p.name)
    block = row[here.array][here.start : here.stop].reshape(here.rows, here.columns)
    left = side_matrix(projection, p.name, "output", p.out_features)
    right = None if p.is_vector else side_matrix(projection, p.name, "input", p.in_features)
    if left is not None:
        block = left.to(block).T @ block
    return block if right is None else block @ right.to(block)


def tangents(model: nn.Module, parameters: list[Parameter], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the direction by the weights of modules, each as its module stores it; a tied weight once per use."""
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    found = {}
    for p in parameters:
        for use in p.uses:
            module, weight = modules[use.module], weights[p.name]
            leaf = next(name for name, own in module.named_parameters(recurse=False) if own is weight)
            along = direction[p.name].T if use.role in ("conv1d", "embedding") else direction[p.name]
            along = along.reshape(weight.shape)
            padding = getattr(module, "padding_idx", None) if use.role.startswith("embedding") else None
            if padding is not None:  # this row takes no gradient from the embedding
                along = along.index_fill(0, torch.tensor([padding], device=along.device), 0.0)
            found[f"{use.module}.{leaf}".lstrip(".")] = along
    return found


def token_derivatives(losses: TokenLosses, model: nn.Module, batch: Batch, along: dict[str, Tensor]) -> Tensor:
    """Return [B, T] float64: the derivative of every token's loss along the tangents. Cost: about three forward passes.

    Attention runs unfused: fused kernels have no forward-mode derivative. Raises ValueError for a model with another
    operation that has none.
    """
    whole = forward_mode.LossModule(model, losses)
    weights = {name: weight.detach() for name, weight in whole.named_parameters(remove_duplicate=False)}
    directions = {f"model.{name}": direction for name, direction in along.items()}
    points = {name: weights[name] for name in directions}

    def at(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(whole, weights, (batch,), tie_weights=False)

    return forward_mode.along(at, points, directions, "this model has no token scores")[1].double()
