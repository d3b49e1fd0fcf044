"""Products of the training loss's curvature with vectors, over chosen weights; the curvature itself is never formed.

Hessian       H v = ∇(∇L · v): the gradient's graph, differentiated once more (Pearlmutter 1994).
Gauss-Newton  Jᵀ (∇²ℓ) J v with J the outputs' Jacobian (Schraudolph 2002): the loss's second derivative by the outputs
              kept, that of the model dropped. Positive semi-definite wherever the loss is convex in the outputs, as cross-
              entropy and squared error are. The outputs are what the model's forward returns: the graph is cut there.
Both need one forward and one backward pass with its own graph per batch, then two passes back (one for H) per vector. An
L2 term ½ l2 ‖θ‖² of the training objective is part of the curvature and of no gradient.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only  # knows transformers' outputs

from engine.batches import Batch
from engine.coordinates import Coordinates
from engine.forward_mode import LossModule
from engine.gradient_batch import check_losses
from engine.prefix import Prefix, Recording, recorded_bytes
from engine.vocabulary import CountedTokens

Loss = Callable[[nn.Module, Batch], Tensor]  # [B]


class Operator(Protocol):
    """A symmetric linear map over chosen weights; whether local or distributed, a solver cannot tell."""

    size: int

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return curvature × block, (size, k) float64: of the mean loss of all rows, or of the rows with these ids."""
        ...


@dataclass(frozen=True)
class Examples:
    """Training examples as an operator reads them."""

    ids: Tensor  # int64 [n]
    blocks: Sequence[Sequence[Batch]]  # every example once; each block gives one partial sum
    gather: Callable[[Tensor], Sequence[Batch]]  # batches of any of them, repeated ids repeated


class Curvature:
    """Curvature products of one model, summed over examples: what a worker computes for a reduction block."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        coordinates: Coordinates,
        kind: str = "gauss-newton",  # or "hessian"
        dtype: torch.dtype = torch.float32,  # of the products; their sums are float64
    ) -> None:
        if kind not in PRODUCTS:
            raise ValueError(f"curvature={kind!r} is not known: use one of {', '.join(PRODUCTS)}")
        held = next(model.parameters()).dtype
        self.model = model if held == dtype else copy.deepcopy(model).to(dtype)
        for weight in self.model.parameters():
            weight.requires_grad_(False)
        self.loss, self.coordinates, self.dtype = loss, coordinates, dtype
        self.prefix = Prefix(self.model, (w.name for w in coordinates.weights))
        self._product = PRODUCTS[kind]
        self._counted = CountedTokens()

    def total(self, batches: Iterable[tuple[Batch, Recording | None]], block: Tensor) -> Tensor:
        """Return Σ_z (curvature of ℓ_z) × block, (size, k) float64, examples below the chosen weights replayed if recorded.

        Raises FloatingPointError naming examples whose product is not finite.
        """
        vectors, scales = _scaled(block)
        tangents = [self.coordinates.tensors(v) for v in vectors.to(self.dtype)]
        total: Tensor | None = None
        for batch, recording in batches:
            self._counted.look(partial(self.loss, self.model, batch))
            weights = self._weights()
            sums = torch.empty_like(vectors) if total is None else total
            with self.prefix.replay(recording), _differentiable():
                for row, product in zip(sums, self._product(self, weights, batch, tangents), strict=True):
                    found = self._finite(self.coordinates.flat(product), batch)
                    row.copy_(found) if total is None else row.add_(found)
            total = sums
        return torch.zeros_like(block) if total is None else total.mul_(scales).T.contiguous()

    def record(self, batch: Batch) -> Recording | None:
        """Return what the frozen part of the model gives for this batch; None where nothing can be replayed."""
        self._counted.look(partial(self.loss, self.model, batch))
        weights = self._weights()
        with _differentiable():
            return self.prefix.record(lambda: self.losses(weights, batch))

    def losses(self, weights: list[Tensor], batch: Batch) -> Tensor:
        """Return [B] with these tensors in the place of the chosen weights."""
        with self._counted:
            return losses_at(self.model, self.loss, self.coordinates, weights, batch)

    def _weights(self) -> list[Tensor]:
        named = dict(self.model.named_parameters())
        return [named[w.name].detach().requires_grad_() for w in self.coordinates.weights]

    def _finite(self, product: Tensor, batch: Batch) -> Tensor:
        if not all_finite(product):
            raise FloatingPointError(
                f"a curvature product in {self.dtype} is not finite for examples {batch.ids[:5].tolist()} and their "
                f"batch: leave them out, or take a wider curvature dtype."
            )
        return product


class LocalOperator:
    """The curvature of the mean training loss, computed here; reduction blocks are added as they are on a cluster."""

    def __init__(
        self,
        curvature: Curvature,
        examples: Examples,
        l2: float | Tensor = 0.0,  # of ½ l2 ‖θ‖² in the training objective; (size, 1): each weight has its own
        cache_bytes: int = 0,  # memory for what the frozen lower layers give; batches beyond it are computed in full
    ) -> None:
        self.size = curvature.coordinates.size
        self._curvature, self._examples, self._l2 = curvature, examples, l2
        self._left = cache_bytes
        self._recordings: dict[tuple[int, int], Recording | None] = {}

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return curvature × block, (size, k) float64. Raises ValueError for a block of another shape or dtype."""
        check_block(self.size, block)
        if ids is None:
            partials = (self._curvature.total(self._replayed(i), block) for i in range(len(self._examples.blocks)))
            return self._mean(tree_sum(partials), len(self._examples.ids), block)
        batches = [(batch, None) for batch in self._examples.gather(ids)]
        return self._mean(self._curvature.total(batches, block), len(ids), block)

    def _mean(self, total: Tensor, count: int, block: Tensor) -> Tensor:
        """Return the mean product with the L2 term's; without one, vectors as long as all weights are not gone over again."""
        mean = total.div_(count) if count > 1 else total
        return mean if isinstance(self._l2, float) and self._l2 == 0 else mean + self._l2 * block

    def _replayed(self, block: int) -> Iterator[tuple[Batch, Recording | None]]:
        for position, batch in enumerate(self._examples.blocks[block]):
            key = (block, position)
            if key not in self._recordings and self._left > 0:
                recording = self._curvature.record(batch)
                self._left -= recorded_bytes(recording) if recording else 0
                self._recordings[key] = recording if self._left >= 0 else None
            yield batch, self._recordings.get(key)


def losses_at(model: nn.Module, loss: Loss, coordinates: Coordinates, weights: list[Tensor], batch: Batch) -> Tensor:
    """Return [B]: the loss with these tensors in the place of the chosen weights; the model is left as it is."""
    named = {f"model.{w.name}": tensor for w, tensor in zip(coordinates.weights, weights, strict=True)}
    losses = functional_call(LossModule(model, loss), named, (batch,))
    check_losses(losses, len(batch))
    return losses


def directional_derivatives(
    model: nn.Module,
    loss: Loss,
    coordinates: Coordinates,
    batch: Batch,
    direction: Tensor,  # (size,), such as one query's H⁻¹∇ℓ
) -> tuple[Tensor, Tensor]:  # both float64 [B]
    """Return ℓ_z and ∇ℓ_z · direction for every example: one forward pass in forward mode, no gradient made.

    An embedding's padding row has no gradient, as in backward passes.
    """
    named = dict(model.named_parameters())
    weights = tuple(named[w.name].detach() for w in coordinates.weights)
    vectors, scale = _scaled(direction[:, None])
    tangents = tuple(coordinates.tensors(vectors[0].to(weights[0].dtype)))
    with _differentiable(), _padding_held(model):
        losses, derivatives, *_ = torch.func.jvp(
            lambda *given: losses_at(model, loss, coordinates, list(given), batch), weights, tangents
        )
    return losses.detach().double(), derivatives.double() * scale.squeeze()


def tree_sum(partials: Iterable[Tensor]) -> Tensor:
    """Return the sum in an order that follows from the number of partials alone: neighbours first, then their sums."""
    stack: list[tuple[int, Tensor]] = []  # (height, sum of 2^height partials)
    for total in partials:
        height = 0
        while stack and stack[-1][0] == height:
            total, height = stack.pop()[1] + total, height + 1
        stack.append((height, total))
    total = stack.pop()[1]
    while stack:
        total = stack.pop()[1] + total
    return total


def all_finite(tensor: Tensor) -> bool:
    """Tell whether all entries are finite, by their sum alone where that is: a tenth of the time of a look at each."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_block(size: int, block: Tensor) -> None:
    """Raise ValueError unless the block is (size, k) float64."""
    if block.dim() != 2 or len(block) != size or block.dtype != torch.float64:
        raise ValueError(f"block is {tuple(block.shape)} {block.dtype}: needs ({size}, k) torch.float64")


def _gauss_newton(
    curvature: Curvature, weights: list[Tensor], batch: Batch, tangents: list[list[Tensor]]
) -> Iterator[Sequence[Tensor]]:
    """Yield Jᵀ (∇²ℓ) J v for every tangent v. J v is the derivative of Jᵀu by u, along v."""
    inner: list[Tensor] = []  # outputs at the end of the model's graph
    outer: list[Tensor] = []  # the same numbers at the beginning of the loss's graph

    def cut(out: Tensor) -> Tensor:
        if not out.requires_grad:
            return out
        inner.append(out)
        outer.append(out.detach().requires_grad_())
        return outer[-1]

    handle = curvature.model.register_forward_hook(lambda _, __, output: tree_map_only(Tensor, cut, output))
    try:
        losses = curvature.losses(weights, batch)
    finally:
        handle.remove()
    if not inner or not losses.requires_grad:
        raise ValueError(
            "Gauss-Newton products need a loss of what the model's forward returns for the chosen weights; this one does "
            "not read it. Call the model itself in the task's loss, check the chosen modules, or use curvature=hessian."
        )
    slopes = torch.autograd.grad(losses.sum(), outer, create_graph=True, materialize_grads=True)
    dual = [torch.zeros_like(out, requires_grad=True) for out in inner]
    pulled = torch.autograd.grad(inner, weights, dual, create_graph=True, materialize_grads=True)
    for tangent in tangents:
        pushed = _derivatives(pulled, dual, tangent)
        yield _derivatives(inner, weights, _derivatives(slopes, outer, pushed))


def _hessian(
    curvature: Curvature, weights: list[Tensor], batch: Batch, tangents: list[list[Tensor]]
) -> Iterator[Sequence[Tensor]]:
    """Yield H v for every tangent v: the derivative of ∇ℓ · v."""
    losses = curvature.losses(weights, batch)
    if not losses.requires_grad:
        raise ValueError("the loss does not depend on any of the chosen weights: check the chosen modules")
    gradient = torch.autograd.grad(losses.sum(), weights, create_graph=True, materialize_grads=True)
    for tangent in tangents:
        yield _derivatives(gradient, weights, tangent)


PRODUCTS: dict[str, Callable[..., Iterator[Sequence[Tensor]]]] = {"gauss-newton": _gauss_newton, "hessian": _hessian}


def _derivatives(values: Sequence[Tensor], by: Sequence[Tensor], along: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return Σ along · ∂values/∂by, zero where nothing depends; the graph is kept for the next vector."""
    kept = [(value, seed) for value, seed in zip(values, along, strict=True) if value.requires_grad]
    if not kept:
        return [torch.zeros_like(b) for b in by]
    outputs, seeds = zip(*kept, strict=True)
    return torch.autograd.grad(outputs, by, seeds, retain_graph=True, materialize_grads=True)


def _scaled(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the block's columns as rows [k, size] with largest entry in [1, 2), and the factors [k, 1] taken out.

    The factors are powers of two, so a product is linear in the scale to the last bit and narrow types do not underflow.
    """
    rows = block.T.contiguous()
    ends = [torch.stack(row.aminmax()) for row in rows]  # three times as fast as along a dimension
    largest = torch.stack(ends).abs().amax(1, keepdim=True)
    scales = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)
    return rows / scales, scales


@contextmanager
def _differentiable() -> Iterator[None]:
    """Graphs on, and attention by its formula: the fused kernels have neither a second derivative nor forward mode."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _padding_held(model: nn.Module) -> Iterator[None]:
    """Keep the padding rows of embeddings constant: forward mode does not know padding_idx."""

    def hold(row: Tensor, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.where((args[0] == module.padding_idx).unsqueeze(-1), row, output)

    padded = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    handles = [m.register_forward_hook(partial(hold, m.weight[m.padding_idx].detach())) for m in padded]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
