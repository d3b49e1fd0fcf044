"""The slow exact answers: autograd loops, dense matrices, full sorts. Everything in float64, nothing from engine/ but types."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.batches import Batch


def one_example(batch: Batch, position: int) -> Batch:
    """Return a batch of one example, its padding cut off."""
    tensors = {name: tensor[position : position + 1] for name, tensor in batch.tensors.items()}
    if "attention_mask" in tensors:
        length = int(tensors["attention_mask"].sum())
        tensors = {name: t[:, :length] if t.dim() == 2 else t for name, t in tensors.items()}
    return Batch(batch.ids[position : position + 1], tensors)


def gradients(model: nn.Module, loss: Callable, batch: Batch) -> dict[str, Tensor]:
    """Return [B, *shape] of every parameter in its own shape: one plain backward pass per example, run alone."""
    named = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    before = {name: weight.requires_grad for name, weight in named.items()}
    for weight in named.values():
        weight.requires_grad_(True)
    for position in range(len(batch)):
        value = loss(model, one_example(batch, position)).sum()
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for (name, weight), gradient in zip(named.items(), found, strict=True):
            rows[name].append((torch.zeros_like(weight) if gradient is None else gradient).detach().double())
    for name, weight in named.items():
        weight.requires_grad_(before[name])
    return {name: torch.stack(found) for name, found in rows.items()}


def flat(gradients: dict[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """Return [B, p]: the gradients of these parameters, or of all, side by side."""
    return torch.cat([gradients[name].flatten(1) for name in (names or gradients)], 1)


def trac_in_cp(
    checkpoints: Sequence[tuple[nn.Module, float]], loss: Callable, train: Batch, query: Batch
) -> tuple[Tensor, Tensor]:
    """Return Σ_i η_i ∇ℓ(w_i, z)·∇ℓ(w_i, z′), [n, Q], and Σ_i η_i ‖∇ℓ(w_i, z)‖², [n]: one product per triple."""
    scores = torch.zeros(len(train), len(query), dtype=torch.float64)
    own = torch.zeros(len(train), dtype=torch.float64)
    for model, rate in checkpoints:
        a, b = flat(gradients(model, loss, train)), flat(gradients(model, loss, query))
        for i in range(len(train)):
            own[i] += rate * torch.dot(a[i], a[i])
            for j in range(len(query)):
                scores[i, j] += rate * torch.dot(a[i], b[j])
    return scores, own


def sgd_step(model: nn.Module, loss: Callable, batch: Batch, rate: float) -> Tensor:
    """Take one step of SGD on the batch's mean loss in place; return its per-example gradients [b, p] before the step."""
    rows = gradients(model, loss, batch)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight -= rate * rows[name].mean(0)
    return flat(rows)


def every_step(
    model: nn.Module, loss: Callable, train: Batch, query: Batch, visits: Sequence[tuple[list[int], float]]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Train in place on the (rows, learning rate) of each visit; yield the rows, ℓ(w_t, z′) − ℓ(w_{t+1}, z′) [Q], and
    (η/b) ∇ℓ(w_t, z)·∇ℓ(w_t, z′) [b, Q]."""
    for rows, rate in visits:
        batch = Batch(train.ids[rows], {name: tensor[rows] for name, tensor in train.tensors.items()})
        before, others = loss(model, query).detach(), flat(gradients(model, loss, query))
        own = sgd_step(model, loss, batch, rate)
        yield rows, before - loss(model, query).detach(), rate / len(rows) * own @ others.T


def trac_in_ideal(
    model: nn.Module, loss: Callable, train: Batch, query: Batch, visits: Sequence[tuple[list[int], float]]
) -> tuple[Tensor, Tensor]:
    """Return TracInIdeal [n, Q], for steps that visit one example each, and TracIn [n, Q], its first order."""
    ideal, first = torch.zeros(2, len(train), len(query), dtype=torch.float64)
    for [row], fall, products in every_step(model, loss, train, query, visits):
        ideal[row] += fall
        first[row] += products[0]
    return ideal, first


def top_k(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[list, list]:
    """Return per query the k (score, id) pairs at each end: a full sort, ties by the smaller id."""
    proponents, opponents = [], []
    for column in scores.T:
        pairs = list(zip(column.tolist(), ids.tolist(), strict=True))
        proponents.append(sorted(pairs, key=lambda p: (-p[0], p[1]))[:k])
        opponents.append(sorted(pairs, key=lambda p: (p[0], p[1]))[:k])
    return proponents, opponents


def dense_projection_variance(a: Tensor, b: Tensor, d: int) -> float:
    """Return Var⟨Ga, Gb⟩ for G (d, p) of N(0, 1/d): (‖a‖²‖b‖² + (a·b)²)/d."""
    return float((a @ a) * (b @ b) + (a @ b) ** 2) / d


def sign_projection_variance(a: Tensor, b: Tensor, d: int) -> float:
    """Return the same for entries ±1/√d, whose fourth moment is smaller by Σ 2 a_i² b_i²."""
    return dense_projection_variance(a, b, d) - 2 * float((a**2 * b**2).sum()) / d


def two_sided_projection_variance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int) -> float:
    """Return Var of the two-sided dot product of two rank-one gradients δxᵀ: (s² + v_s)(t² + v_t) − (st)²."""
    moments, exact = 1.0, 1.0
    for left, right in zip(a, b, strict=True):
        dot = float(left @ right)
        moments *= dot**2 + dense_projection_variance(left, right, k)
        exact *= dot**2
    return moments - exact


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Return the share of (positive, negative) pairs in the right order, ties counted half."""
    pairs = [
        1.0 if s > t else 0.5 if s == t else 0.0
        for s, p in zip(scores, positive, strict=True) if p
        for t, q in zip(scores, positive, strict=True) if not q
    ]  # fmt: skip
    return sum(pairs) / len(pairs)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Return ‖value − truth‖ / ‖truth‖."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-300))


def hessian(model: nn.Module, loss: Callable, batch: Batch, names: Sequence[str]) -> Tensor:
    """Return Σ_z ∇²ℓ_z over these weights, (p, p), each in its own shape: the gradient differentiated entry by entry."""
    weights = [dict(model.named_parameters())[name].requires_grad_(True) for name in names]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        gradient = torch.autograd.grad(loss(model, batch).sum(), weights, create_graph=True, materialize_grads=True)
        return _rows(torch.cat([g.flatten() for g in gradient]), weights)


def gauss_newton(
    model: nn.Module, outputs: Callable, output_hessian: Callable, batch: Batch, names: Sequence[str]
) -> Tensor:
    """Return Σ_z J_zᵀ A_z J_z, (p, p): every output's gradient by itself, A_z by its formula from the example's outputs."""
    weights = [dict(model.named_parameters())[name].requires_grad_(True) for name in names]
    total = torch.zeros(0)
    for position in range(len(batch)):
        one = one_example(batch, position)
        out = outputs(model, one).flatten()
        jacobian = _rows(out, weights)
        part = jacobian.T @ output_hessian(out.detach(), one) @ jacobian
        total = part if position == 0 else total + part
    return total


def softmax_hessian(logits: Tensor) -> Tensor:
    """Return diag(p) − ppᵀ of one softmax cross-entropy."""
    p = torch.softmax(logits, -1)
    return torch.diag(p) - torch.outer(p, p)


def _rows(values: Tensor, weights: list[Tensor]) -> Tensor:
    """Return every value's gradient as a row."""
    rows = [torch.autograd.grad(v, weights, retain_graph=True, materialize_grads=True) for v in values]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()


class MatrixOperator:
    """The mean of given symmetric matrices [n, p, p]; their positions are the ids."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices, self.size = matrices, matrices.shape[1]

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        return (self.matrices if ids is None else self.matrices[ids]).mean(0) @ block


def filtered(matrix: Tensor, b: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return Q f(μ) Qᵀ b for the symmetric matrix QμQᵀ."""
    mu, vectors = torch.linalg.eigh(matrix)
    return vectors @ (function(mu)[:, None] * (vectors.T @ b))
