"""Influence scores from solved queries: their sign and unit, and the solve on stored rows.

Everything here takes x = (H + λI)⁻¹ ∇ℓ(q) as given, whichever solver made it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.curvature import tree_sum


def per_example_loo(
    products: Tensor,  # ∇ℓ(z) · x_q, [n, Q]
    count: int,  # training examples in the mean loss
) -> Tensor:
    """Return the predicted rise of the query's loss when z is left out: products / n. Positive: z is a proponent.

    The papers' I(z, q) = −∇ℓ(q)ᵀH⁻¹∇ℓ(z) is the slope for weighing z up by ε; leaving it out is ε = −1/n, hence −I/n
    (Koh & Liang 2017, section 2.1; FastIF has the same sign).
    """
    return products / count


def gram(rows: Sequence[Tensor]) -> Tensor:  # blocks [n_i, D]
    """Return GᵀG, (D, D) float64: one partial per block of stored rows, added in a fixed order."""
    return tree_sum(block.double().T @ block.double() for block in rows)


def projected_solve(
    gram: Tensor,  # GᵀG, (D, D) float64
    count: int,  # n rows in it
    queries: Tensor,  # [Q, D]
    damping: float,  # λ, absolute
) -> Tensor:  # float64 [Q, D]
    """Return (GᵀG/n + λI)⁻¹ q for every projected query gradient: the empirical Gauss-Newton of stored rows.

    Source: LoGra (Choe et al. 2024), section 3. Raises ValueError where the damped matrix is not positive definite.
    """
    matrix = gram / count + damping * torch.eye(len(gram), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    smallest, largest = factor.diagonal().min(), factor.diagonal().max()
    if failed or smallest <= 1e-8 * largest:
        raise ValueError(
            f"GᵀG/n + λI is not positive definite for {count} rows of {len(gram)} columns and λ = {damping:.3g}; its mean "
            f"eigenvalue is {float(gram.trace()) / count / len(gram):.3g}. Raise the damping."
        )
    return torch.cholesky_solve(queries.double().T, factor).T
