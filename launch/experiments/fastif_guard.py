"""What a comparison of influence scores must show before its number means anything.

With λ far above λ_max, (H + λI)⁻¹ is the identity over λ: any two estimates agree then, and neighbours by feature are
neighbours by influence. So λ must be at most a tenth of λ_max, and the exact scores must not be those of plain gradients.
"""

from dataclasses import replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from launch.experiments.registry import Gate

MOST_DAMPING, MOST_ALIKE = 0.1, 0.97


def guarded(gates: list[Gate], relative_damping: float, alike: list[float]) -> list[Gate]:
    """Return the gates with the guard's own two; where these fail, the judged ones say that they are void, and fail.

    `relative_damping` is λ_eff/λ_max, `alike` each query's correlation of plain gradients' scores with the exact ones.
    """
    guard = [
        Gate("guard: λ_eff / λ_max", relative_damping, threshold=MOST_DAMPING, at_least=False),
        Gate("guard: corr(identity, full)", float(np.mean(alike)), threshold=MOST_ALIKE, at_least=False),
    ]
    if all(gate.record()["pass"] for gate in guard):
        return [*gates, *guard]
    void = [
        replace(gate, name=f"{gate.name} (void: the guard fails)", value=0.0 if gate.at_least else 1.0, ci=None)
        if gate.threshold is not None
        else gate
        for gate in gates
    ]
    return [*void, *guard]


def pearson(a: Tensor, b: Tensor) -> list[float]:
    """Return the correlation of two [N, Q] arrays, column by column."""
    return torch.nn.functional.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=0).tolist()


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Return the three correlations of two score vectors."""
    return {
        "pearson": float(stats.pearsonr(a, b).statistic),
        "spearman": float(stats.spearmanr(a, b).statistic),
        "kendall": float(stats.kendalltau(a, b).statistic),
    }
