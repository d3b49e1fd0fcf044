"""LiSSA for a large model without its large vectors, and the exact solve of the same matrix.

With two classes every product with the Gauss-Newton matrix of some rows lies in the span of A's rows (fastif_minilm.py). So
LiSSA started at b never leaves x = c b + r Aᵀβ, and its n + 1 numbers (c, β) follow from the Gram matrix AAᵀ and from A b:
the engine's own recursion, over the same random batches, in microseconds an iteration. r = ‖b‖/√s keeps β near 1.
"""

import torch
from torch import Tensor

from engine.counters import derive_key
from engine.solvers import finish
from engine.stochastic_solvers import Lissa, draw, lissa_repetition
from launch.experiments.fastif_minilm import Reference

PROBES = 16  # batches that the scale is taken from, as the engine's batch_scale


class Span:
    """The matrix of some rows as an operator on (c, β), for one block of right-hand sides."""

    def __init__(
        self,
        gram: Tensor,  # AAᵀ, float64 [n, n]
        seen: Tensor,  # A b, [n, k]
        unit: Tensor,  # r of every right-hand side, [k]
    ) -> None:
        self.gram, self.seen, self.unit = gram, seen, unit
        self.size = 1 + len(gram)

    def apply(self, block: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the matrix × block, (1 + n, k): AᵀA x/n of all rows, or of those with these positions."""
        rows = torch.arange(len(self.gram)) if ids is None else ids
        product = block[0] * self.seen[rows] / self.unit + self.gram[rows] @ block[1:]
        return torch.zeros_like(block).index_add_(0, 1 + rows, product / len(rows))

    def start(self) -> Tensor:
        """Return b itself, (1 + n, k)."""
        return torch.cat([torch.ones(1, len(self.unit), dtype=torch.float64), torch.zeros_like(self.seen)])


def span_of(reference: Reference, b: Tensor, scale: float) -> Span:
    return Span(reference.gram, reference.times(b), b.norm(dim=0) / scale**0.5)


def repetitions(span: Span, settings: Lissa, largest: float) -> Tensor:
    """Return x_J/s of every repetition, in the span's numbers, [T, 1 + n, k]."""
    ids = torch.arange(len(span.gram))
    runs = (lissa_repetition(span, span.start(), ids, settings, t, largest) for t in range(settings.repetitions))
    return torch.stack([finish(run) for run in runs])


def exact_in_span(span: Span, damping: float) -> Tensor:
    """Return (AᵀA/n + λI)⁻¹ b in the span's numbers."""
    n = len(span.gram)
    inner = torch.linalg.cholesky(span.gram + n * damping * torch.eye(n, dtype=torch.float64))
    return torch.cat([span.start()[:1], -torch.cholesky_solve(span.seen, inner) / span.unit]) / damping


def expanded(reference: Reference, span: Span, block: Tensor, b: Tensor) -> Tensor:
    """Return x = c b + r Aᵀβ, (size, k)."""
    return block[0] * b + reference.transposed_times(block[1:] * span.unit)


def margins(span: Span, block: Tensor) -> Tensor:
    """Return A x of the rows themselves, [n, k]."""
    return block[0] * span.seen + span.unit * (span.gram @ block[1:])


def lengths(span: Span, block: Tensor, b_squares: Tensor) -> Tensor:
    """Return ‖x‖, [k]; `b_squares`: ‖b‖²."""
    beta = block[1:] * span.unit
    cross = 2 * block[0] * (span.seen * beta).sum(0)
    return (block[0].square() * b_squares + cross + (beta * (span.gram @ beta)).sum(0)).clamp(min=0).sqrt()


def batch_scale(gram: Tensor, batch_size: int, seed: int = 0) -> float:
    """Return the largest λ_max of some random batches, those that the engine looks at: LiSSA's s."""
    ids, key = torch.arange(len(gram)), derive_key(seed, "scale")
    batches = [draw(ids, key, i, batch_size) for i in range(PROBES)]
    return max(float(torch.linalg.eigvalsh(gram[rows][:, rows])[-1]) / batch_size for rows in batches)
