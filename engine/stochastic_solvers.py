"""Inverse-curvature products from small random batches: LiSSA, and the sketch of the whole inverse.

Batches are drawn with replacement by integer counters from (seed, repetition or block, iteration), so a repetition of LiSSA
or a block of the sketch's columns is one unit of work that any worker can do, in any order, with the same bits.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.counters import derive_key, normals, words
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
    decay, s, length = 1 - settings.damping / settings.scale, settings.scale, b.norm(dim=0)
    while state.iteration < settings.iterations:
        j = state.iteration + 1
        product = applied(operator, state.x, batches[state.iteration])
        x = b.add(state.x, alpha=decay).sub_(
            product, alpha=1 / s
        )  # two passes over p numbers: most of the time at B = 1
        refuse_growth("LiSSA", x.norm(dim=0), (j + 1) * length, j, f"scale {s:.3g}", f"scale={2 * s:.3g}")
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
    estimates: Iterable[Tensor],  # x_J/s of every repetition, in order; one is held at a time
    largest: float,
    tolerance: float = 0.1,
) -> Solution:
    """Return the repetitions' mean with its standard error (None for a single one) and the residual on all examples."""
    count, mean, squares = 0, torch.zeros_like(b), torch.zeros_like(b)
    for count, x in enumerate(estimates, 1):  # Welford 1962
        change = x - mean
        mean += change / count
        squares += change * (x - mean)
    error = (squares / (count * (count - 1))).sqrt() if count > 1 else None
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
    """Settings of the inverse-Hessian sketch S ≈ (H² + λI)⁻¹ H Gᵀ, and so of S G v ≈ H⁻¹v for any v."""

    damping: float  # λ, absolute
    step: float  # η < 1/(λ_max(H_B)² + λ)
    columns: int = 256  # d, rows of G: the error of S G v falls with √d
    width: int = 16  # columns found together, from the same batches; others have batches of their own
    iterations: int = 2000
    batch_size: int = 32
    seed: int = 0

    @property
    def blocks(self) -> list[range]:
        """Return which columns are found together."""
        return [range(i, min(i + self.width, self.columns)) for i in range(0, self.columns, self.width)]


@dataclass(frozen=True)
class SketchState:
    iteration: int
    s: Tensor  # (size, k)
    total: Tensor  # (size, k), the sum of the second half's iterates


def sketch_columns(
    operator: Operator,
    g: Tensor,  # (size, k): these columns of Gᵀ
    ids: Tensor,  # int64 [n], of the training examples
    settings: Sketch,
    block: int,  # position in settings.blocks
    largest: float,  # λ_max
    state: SketchState | None = None,
) -> Generator[SketchState, None, Tensor]:
    """Return these columns of S, (size, k) (TracIn, Pruthi et al. 2020, appendix A.1, equation 3).

    Stochastic descent on ‖HS − Gᵀ‖² along 2 H_{B₁}(H_{B₂} S − Gᵀ) with two independent batches: with one batch for both the
    mean would be (E H_B²)⁻¹ H Gᵀ. The iterates of the second half are averaged. From S = 0, H's null space stays at 0.
    """
    g = right_hand_side(operator, g, settings.damping)
    state = state or SketchState(0, torch.zeros_like(g), torch.zeros_like(g))
    reach = 2 * settings.step * largest * g.norm(dim=0)  # how far one step of a convergent descent can go
    while state.iteration < settings.iterations:
        t = state.iteration + 1
        first, second = sketch_batches(ids, settings, block, t)
        inner = applied(operator, state.s, second) - g
        s = state.s - 2 * settings.step * (applied(operator, inner, first) + settings.damping * state.s)
        setting, remedy = f"step {settings.step:.3g}", f"step={settings.step / 4:.3g}"
        refuse_growth("the sketch", s.norm(dim=0), t * reach, t, setting, remedy)
        total = state.total + s if 2 * t > settings.iterations else state.total
        state = SketchState(t, s, total)
        yield state
    return state.total / (settings.iterations - settings.iterations // 2)


def sketch_batches(ids: Tensor, settings: Sketch, block: int, iteration: int) -> tuple[Tensor, Tensor]:
    """Return two independent batches of ids."""
    first, second = (derive_key(settings.seed, "sketch", block, side) for side in (1, 2))
    return draw(ids, first, iteration, settings.batch_size), draw(ids, second, iteration, settings.batch_size)


def sketch_matrix(sizes: dict[str, int], settings: Sketch, block: int) -> Tensor:  # sizes: of the weights, by name
    """Return one block's columns of Gᵀ, (Σ sizes, k) float64: entries N(0, 1/d), so that E GᵀG = I."""
    columns = settings.blocks[block]
    parts = []
    for name, size in sizes.items():
        key = derive_key(settings.seed, "sketch", name)
        drawn = normals(key, columns.start * size, len(columns) * size)
        parts.append(torch.from_numpy(drawn).view(len(columns), size).T)
    return torch.cat(parts) / settings.columns**0.5


def sketched(
    b: Tensor,  # (size, k) float64
    blocks: Iterable[tuple[Tensor, Tensor]],  # S and Gᵀ, (size, columns) each
) -> tuple[Tensor, Tensor]:  # both (size, k)
    """Return S G b and its standard error: every column of S gives an independent estimate, whose mean it is."""
    total, squared, columns = torch.zeros_like(b), torch.zeros_like(b), 0
    for s, g in blocks:
        c = g.T @ b
        total += s @ c
        squared += s.square() @ c.square()
        columns += s.shape[1]
    variance = (columns * squared - total.square()) / max(1, columns - 1)
    return total, variance.clamp(min=0).sqrt()


def sketch_solution(
    operator: Operator,
    b: Tensor,
    settings: Sketch,
    blocks: Iterable[tuple[Tensor, Tensor]],  # as in `sketched`
    largest: float,
    tolerance: float = 0.1,
) -> Solution:
    """Return S G b with its standard error, and its residual in (H² + λI) x = Hb on all examples."""
    x, error = sketched(right_hand_side(operator, b, settings.damping), blocks)
    left = squared_residual(operator, x, b, settings.damping)
    return solution(x, b, left, tolerance, settings.iterations, settings.damping, largest, error)


def sketch_step(scale: float, damping: float = 0.0) -> float:
    """Return a step for batches whose largest eigenvalue is `scale`: half of what still converges."""
    return 1 / (2 * (scale**2 + damping))


def draw(ids: Tensor, key: int, iteration: int, count: int) -> Tensor:
    """Return `count` ids drawn with replacement at this iteration of a key's stream."""
    if len(ids) == 0 or count < 1:
        raise ValueError(f"a batch of {count} from {len(ids)} training examples: both must be at least 1")
    positions = words(key, iteration * count, count) % np.uint64(len(ids))
    return ids[torch.from_numpy(positions.astype(np.int64))]
