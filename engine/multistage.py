"""Multi-stage influence (Chen et al. 2020): from an example of pretraining to a fine-tuned model's prediction.

Pretraining leaves (W̄, U) = argmin G(W, U), the mean of g(z) over m examples; fine-tuning leaves Θ, and W as well or not:

    case 1, W fixed     Θ* = argmin F(W̄, Θ)                           Algorithm 1, equations 9 to 11
    case 2, W updated   (W*, Θ*) = argmin F(W, Θ) + α ‖W − W̄‖²        equations 12 to 15

Weighing z up by ε moves W̄ by −[G''⁻¹∇g(z)]_W, that moves Θ* (and W*), and these a query's loss f. Read backwards this is one
vector s per query, after which every z costs one product, I(z, q) = s · ∇g(z), positive where z does harm. Two things move f,
so s is the sum of two parts. The Hessian of pretraining is that of (W, U) together: U gives way when W moves. Equations 12
and 15 have α, not α/2, in front of the square, hence 2α below; 1/(2ηT) stands for T steps of rate η that were stopped early.

Nothing here knows how a Hessian is inverted or where its products are made: that is in the functions and operators given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.coordinates import Coordinates
from engine.curvature import Operator

Inverse = Callable[[Tensor], Tensor]  # (size, k) float64 -> the inverse Hessian times it


@dataclass(frozen=True)
class Shared:
    """Where the shared weights W stand among the weights of either stage: i-th place to i-th place."""

    pretraining: Tensor  # int64 [w], places in (W, U)
    finetuning: Tensor  # int64 [w], places in (W, Θ)
    own: Tensor  # int64 [t], places of Θ in (W, Θ)
    pretraining_size: int  # numbers in (W, U)
    finetuning_size: int  # numbers in (W, Θ)

    def padded(self, w: Tensor) -> Tensor:
        """Return [w; 0] in the places of (W, U): U has no part in fine-tuning."""
        return placed(w, self.pretraining, self.pretraining_size)


@dataclass(frozen=True)
class Parts:
    """s of every query, (size of (W, U), k), in its two parts: I(z, q) is ∇g(z) · their sum."""

    through_own: Tensor  # by what fine-tuning makes of Θ
    through_shared: Tensor  # by W itself

    @property
    def whole(self) -> Tensor:
        return self.through_own + self.through_shared


def fixed(
    f: Tensor,  # ∇f of every query at (W̄, Θ*), (size of (W, Θ), k)
    finetuning: Inverse,  # of F_ΘΘ
    joint: Operator,  # Hessian of F over (W, Θ)
    pretraining: Inverse,  # of G'' over (W, U)
    shared: Shared,
) -> Parts:
    """Return s of case 1: G''⁻¹ [F_WΘ F_ΘΘ⁻¹ ∇_Θf − ∇_Wf; 0]. Source: Algorithm 1."""
    b, c = f[shared.own], f[shared.finetuning]
    v = finetuning(b)
    pulled = joint.apply(placed(v, shared.own, shared.finetuning_size))[shared.finetuning]  # F_WΘ v
    return _pretrained(pulled, -c, pretraining, shared)


def updated(
    f: Tensor,  # ∇f of every query at (W*, Θ*), (size of (W, Θ), k)
    finetuning: Inverse,  # of F'' + 2αI_W over (W, Θ), at (W*, Θ*)
    pretraining: Inverse,  # of G'' over (W, U), at (W̄, U)
    shared: Shared,
    alpha: float,
) -> Parts:
    """Return s of case 2: −2α G''⁻¹ [((F'' + 2αI_W)⁻¹ ∇f)_W; 0]. Source: equations 13 to 15, transposed."""
    b, c = (placed(f[places], places, shared.finetuning_size) for places in (shared.own, shared.finetuning))
    v = finetuning(torch.cat([b, c], 1))[shared.finetuning]
    through_own, through_shared = (-2 * alpha * v).tensor_split(2, 1)
    return _pretrained(through_own, through_shared, pretraining, shared)


def _pretrained(through_own: Tensor, through_shared: Tensor, pretraining: Inverse, shared: Shared) -> Parts:
    """Return G''⁻¹ [r; 0] of both parts r, solved together."""
    solved = pretraining(shared.padded(torch.cat([through_own, through_shared], 1)))
    return Parts(*solved.tensor_split(2, 1))


def proximal(
    l2: float | Tensor,  # of ½ l2 ‖·‖² in the objective of fine-tuning
    alpha: float,
    shared: Shared,
) -> Tensor:  # (size of (W, Θ), 1)
    """Return what stands on the diagonal beside F'' in case 2: l2 everywhere and 2α at W."""
    diagonal = torch.zeros(shared.finetuning_size, 1, dtype=torch.float64) + l2
    diagonal[shared.finetuning] += 2 * alpha
    return diagonal


def early_stopping(rate: float, steps: int) -> float:
    """Return the α whose proximal term holds W back about as much as stopping after so many steps: 1/(2ηT)."""
    if rate <= 0 or steps < 1:
        raise ValueError(f"α = 1/(2ηT) needs η > 0 and T ≥ 1, here η = {rate}, T = {steps}: give alpha itself")
    return 1 / (2 * rate * steps)


def shared_places(
    pretraining: Coordinates,  # of (W, U)
    finetuning: Coordinates,  # of (W, Θ)
    names: Mapping[str, str],  # of the weights of W: name in pretraining -> name in fine-tuning
) -> Shared:
    """Return where W stands in both, entry by entry of its weights, however each stage lays them out.

    Raises ValueError naming a weight that is not there, has two shapes, or comes from two.
    """
    ours, theirs = _places(pretraining), _places(finetuning)
    sources: dict[str, str] = {}
    for name, other in names.items():
        if sources.setdefault(other, name) != name:
            raise ValueError(
                f"pretrain.shared: {sources[other]} and {name} of pretraining both became {other}: a weight comes from one"
            )
        for stage, places, one in (("pretraining", ours, name), ("fine-tuning", theirs, other)):
            if one not in places:
                raise ValueError(f"pretrain.shared: {one} is no chosen weight of {stage}: one of {', '.join(places)}")
        if ours[name].shape != theirs[other].shape:
            raise ValueError(
                f"pretrain.shared: {name} is {tuple(ours[name].shape)} in pretraining and {other} "
                f"{tuple(theirs[other].shape)} in fine-tuning: shared weights have one shape"
            )
    own = [places.reshape(-1) for name, places in theirs.items() if name not in set(names.values())]
    return Shared(
        torch.cat([ours[name].reshape(-1) for name in names]),
        torch.cat([theirs[other].reshape(-1) for other in names.values()]),
        torch.cat(own) if own else torch.empty(0, dtype=torch.int64),
        pretraining.size,
        finetuning.size,
    )


def _places(coordinates: Coordinates) -> dict[str, Tensor]:
    """Return name -> the place in the flat vector of every entry of a weight, in the weight's own shape."""
    tensors = coordinates.tensors(torch.arange(coordinates.size))
    return {weight.name: tensor for weight, tensor in zip(coordinates.weights, tensors, strict=True)}


def placed(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Return (size, k) with the rows at their places and 0 elsewhere."""
    return rows.new_zeros(size, rows.shape[1]).index_copy_(0, places, rows)
