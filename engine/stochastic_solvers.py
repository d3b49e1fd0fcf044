"""Inverse-curvature products from small random batches: LiSSA, and the sketch of the whole inverse.

Batches are drawn with replacement by integer counters from (seed, repetition, iteration), so a repetition is one unit of
work that any worker can do, in any order, with the same bits.
"""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.counters import derive_key, words
from engine.curvature import Operator
from engine.solvers import (
    Solution,
    applied,
    finish,
    largest_eigenvalue,
    refuse_growth,
    relative,
    right_hand_side,
    solution,
    squared_residual,
)


@dataclass(frozen=True)
class Lissa:
    """LiSSA's settings (Agarwal et al. 2017; FastIF, Guo et al. 2021, section 3.3).

    The papers' damping d is λ/s: they solve with λ = d·s, often far above λ_max.
    """

    damping: float  # λ, absolute
    scale: float  # s: every batch needs λ_max(H_B)/s < 2 − λ/s
    iterations: int = 1000  # J
    batch_size: int = 1  # B
    repetitions: int = 4  # T
    seed: int = 0


@dataclass(frozen=True)
class LissaState:
    iteration: int
    x: Tensor  # (size, k)


def lissa_repetition(
    operator: Operator,
    b: Tensor,  # (size, k)
    ids: Tensor,  # int64 [n], of the training examples
    settings: Lissa,
    repetition: int,  # 0 … T − 1
    largest: float,  # λ_max
    state: LissaState | None = None,
) -> Generator[LissaState, None, Tensor]:
    """Return x_J/s of one repetition, (size, k):  x₀ = b,  x_j = b + (1 − λ/s) x_{j−1} − H_{B_j} x_{j−1}/s.

    Raises ValueError for a scale that must diverge; FloatingPointError when x outgrows what a convergent recursion reaches.
    """
    b = right_hand_side(operator, b, settings.damping)
    check_scale(settings, largest)
    state = state or LissaState(0, b)
    batches = lissa_batches(ids, settings, repetition)
    decay, s = 1 - settings.damping / settings.scale, settings.scale
    while state.iteration < settings.iterations:
        j = state.iteration + 1
        x = b + decay * state.x - applied(operator, state.x, batches[state.iteration]) / s
        refuse_growth("LiSSA", x.norm(dim=0), (j + 1) * b.norm(dim=0), j, f"scale {s:.3g}", f"scale={2 * s:.3g}")
        state = LissaState(j, x)
        yield state
    return state.x / s


def lissa_batches(ids: Tensor, settings: Lissa, repetition: int) -> Tensor:  # int64 [J, B]
    """Return the examples of every iteration of one repetition."""
    key = derive_key(settings.seed, "lissa", repetition)
    return torch.stack([draw(ids, key, j, settings.batch_size) for j in range(1, settings.iterations + 1)])


def lissa_solution(
    operator: Operator,
    b: Tensor,
    settings: Lissa,
    estimates: list[Tensor],  # x_J/s of every repetition, in order
    largest: float,
    tolerance: float = 0.1,
) -> Solution:
    """Return the repetitions' mean with its standard error (None for a single one) and the residual on all examples."""
    block = torch.stack(estimates)
    mean = block.mean(0)
    error = block.std(0) / len(block) ** 0.5 if len(block) > 1 else None
    left = relative(b - applied(operator, mean) - settings.damping * mean, b)
    return solution(mean, b, left, tolerance, settings.iterations, settings.damping, largest, error)


def check_scale(settings: Lissa, largest: float) -> None:
    """Raise ValueError for a scale at which the recursion's mean already diverges: λ_max/s ≥ 2 − λ/s."""
    if settings.scale <= (largest + settings.damping) / 2:
        raise ValueError(
            f"LiSSA with scale={settings.scale:.3g} diverges for λ_max = {largest:.3g}, λ = {settings.damping:.3g}: it must "
            f"be above {(largest + settings.damping) / 2:.3g}; leave it out to have it chosen."
        )


def batch_scale(
    operator: Operator,
    ids: Tensor,
    batch_size: int,
    seed: int = 0,
    probes: int = 16,
    steps: int = 10,  # of power iteration per probe
) -> float:
    """Return the largest λ_max(H_B) of some random batches: LiSSA's s, with a factor 2 left before a batch diverges."""
    key = derive_key(seed, "scale")
    batches = [draw(ids, key, i, batch_size) for i in range(probes)]
    return max(finish(largest_eigenvalue(operator, batch, max_iterations=steps, seed=seed)) for batch in batches)


@dataclass(frozen=True)
class Sketch:
    """Settings of the inverse-Hessian sketch."""

    step: float  # η < 1/λ_max(H_B)²
    iterations: int = 2000
    batch_size: int = 32
    damping: float = 0.0  # λ of (H² + λI) S = HGᵀ
    seed: int = 0


@dataclass(frozen=True)
class SketchState:
    iteration: int
    s: Tensor  # (size, d)
    total: Tensor  # (size, d), the sum of the second half's iterates


def inverse_sketch(
    operator: Operator,
    g: Tensor,  # (size, d): Gᵀ with entries N(0, 1/d)
    ids: Tensor,  # int64 [n]
    settings: Sketch,
    largest: float,
    tolerance: float = 0.1,
    state: SketchState | None = None,
) -> Generator[SketchState, None, Solution]:
    """Return S ≈ H⁻¹Gᵀ, so that S (G v) is an unbiased estimate of H⁻¹v (TracIn, appendix A.1, equation 3).

    Stochastic descent on ‖HS − Gᵀ‖² along 2 H_{B₁}(H_{B₂} S − Gᵀ) with two independent batches: with one batch for both the
    mean would be (E H_B²)⁻¹ H Gᵀ. The iterates of the second half are averaged. From S = 0, H's null space stays at 0.
    """
    g = right_hand_side(operator, g, settings.damping)
    state = state or SketchState(0, torch.zeros_like(g), torch.zeros_like(g))
    reach = 2 * settings.step * largest * g.norm(dim=0)  # how far one step of a convergent descent can go
    while state.iteration < settings.iterations:
        t = state.iteration + 1
        first, second = sketch_batches(ids, settings, t)
        inner = applied(operator, state.s, second) - g
        s = state.s - 2 * settings.step * (applied(operator, inner, first) + settings.damping * state.s)
        setting, remedy = f"step {settings.step:.3g}", f"step={settings.step / 4:.3g}"
        refuse_growth("the sketch", s.norm(dim=0), t * reach, t, setting, remedy)
        total = state.total + s if 2 * t > settings.iterations else state.total
        state = SketchState(t, s, total)
        yield state
    mean = state.total / (settings.iterations - settings.iterations // 2)
    residual = squared_residual(operator, mean, g, settings.damping)
    return solution(mean, g, residual, tolerance, settings.iterations, settings.damping, largest)


def sketch_batches(ids: Tensor, settings: Sketch, iteration: int) -> tuple[Tensor, Tensor]:
    """Return two independent batches of ids."""
    first, second = (derive_key(settings.seed, "sketch", side) for side in (1, 2))
    return draw(ids, first, iteration, settings.batch_size), draw(ids, second, iteration, settings.batch_size)


def sketch_step(scale: float) -> float:
    """Return a step for batches whose largest eigenvalue is `scale`: half of what still converges."""
    return 1 / (2 * scale**2)


def draw(ids: Tensor, key: int, iteration: int, count: int) -> Tensor:
    """Return `count` ids drawn with replacement at this iteration of a key's stream."""
    if len(ids) == 0 or count < 1:
        raise ValueError(f"a batch of {count} from {len(ids)} training examples: both must be at least 1")
    positions = words(key, iteration * count, count) % np.uint64(len(ids))
    return ids[torch.from_numpy(positions.astype(np.int64))]
