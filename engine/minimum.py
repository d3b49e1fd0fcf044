"""Training to a minimum: the mean loss of all examples plus ½ l2 ‖x‖², down to a gradient of a given length, in float64.

Influence functions are derivatives at a minimum, and their oracles train again to one. L-BFGS (Nocedal & Wright 2006, section
7.2) goes there, first in the weights themselves, then in coordinates in which the Hessian, its eigenvalues made positive, is
the identity; plain steps in these coordinates end it, where the value no longer tells two points apart.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engine.batches import Batch
from engine.coordinates import chosen_coordinates
from engine.curvature import Curvature, Loss, losses_at
from engine.solvers import MAX_EXACT

COLUMNS = 128  # of a Hessian made at a time
PIECE = 5  # steps of L-BFGS between two looks at the gradient
STALLED = 1e4  # times the tolerance: how near plain steps are tried
FLOOR = 1e-6  # least eigenvalue that a step is scaled by

Slope = Callable[[Tensor], tuple[float, Tensor]]  # value and gradient
Seen = Callable[[float], None]  # is told the gradient's length


class MeanLoss:
    """The objective, as a function of the chosen weights in one vector x, which the model need not hold."""

    def __init__(
        self,
        model: nn.Module,  # float64
        loss: Loss,
        batches: Sequence[Batch],  # every example once
        l2: float,
        names: Sequence[str] = ("*",),  # of the chosen weights
    ) -> None:
        self.model, self.loss, self.batches, self.l2 = model, loss, batches, l2
        self.space = chosen_coordinates(model, names)
        self.count = sum(map(len, batches))

    @property
    def weights(self) -> Tensor:
        """Return what the model holds."""
        named = dict(self.model.named_parameters())
        return self.space.flat([named[w.name].detach() for w in self.space.weights]).clone()

    def put(self, x: Tensor) -> None:
        """Let the model hold x."""
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for weight, tensor in zip(self.space.weights, self.space.tensors(x), strict=True):
                named[weight.name].copy_(tensor)

    def losses(self, x: Tensor, batch: Batch) -> Tensor:
        return losses_at(self.model, self.loss, self.space, self.space.tensors(x), batch)

    def summed(self, x: Tensor, batch: Batch) -> tuple[float, Tensor]:
        """Return the sum of some examples' losses at x, and its gradient."""
        x = x.detach().requires_grad_()
        total = self.losses(x, batch).sum()
        return total.item(), torch.autograd.grad(total, x)[0]

    def slope(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the objective and its gradient."""
        x = x.detach()
        value, gradient = self.l2 / 2 * float(x @ x), self.l2 * x
        for batch in self.batches:
            loss, own = self.summed(x, batch)
            value, gradient = value + loss / self.count, gradient + own / self.count
        return value, gradient

    def hessian(self, x: Tensor) -> Tensor:
        """Return the whole matrix at x, which the model then holds."""
        self.put(x)
        curvature = Curvature(self.model, self.loss, self.space, "hessian", torch.float64)
        unit = torch.eye(len(x), dtype=torch.float64, device=x.device)
        columns = [curvature.total([(batch, None) for batch in self.batches], part) for part in unit.split(COLUMNS, 1)]
        matrix = torch.cat(columns, 1) / self.count
        return (matrix + matrix.T) / 2 + self.l2 * unit


def minimise(
    objective: MeanLoss, x: Tensor, steps: int, rounds: int, tolerance: float, each: Seen = lambda length: None
) -> Tensor:
    """Return where the gradient is at most tolerance long: a minimum, unless x is too long for a whole Hessian to be made.

    Raises FloatingPointError if that is not reached.
    """
    if len(x) <= MAX_EXACT:
        return settle(objective, x, steps, rounds, tolerance, each)[0]
    for _ in range(rounds + 1):
        x, _ = descend(objective.slope, x, None, tolerance, steps)
        left = float(objective.slope(x)[1].norm())
        each(left)
        if left <= tolerance:
            return x
    raise FloatingPointError(_missed(rounds, steps, left, tolerance))


def settle(
    objective: MeanLoss, x: Tensor, steps: int, rounds: int, tolerance: float, each: Seen = lambda length: None
) -> tuple[Tensor, Tensor]:
    """Return a minimum, where the gradient is at most tolerance long, and the Hessian there; `each` sees every length.

    L-BFGS from x, then L-BFGS in coordinates in which the Hessian, its eigenvalues made positive, is the identity. Raises
    FloatingPointError if that ends elsewhere, with a negative eigenvalue or a longer gradient. An eigenvalue of 0, to
    rounding, is none: logits may all rise by the same.
    """
    x, _ = descend(objective.slope, x, None, tolerance, steps)
    for done in range(rounds + 1):
        left = float(objective.slope(x)[1].norm())
        each(left)
        matrix = objective.hessian(x)
        mu = torch.linalg.eigvalsh(matrix)
        lowest, zero = float(mu[0]), len(x) * torch.finfo(x.dtype).eps * float(mu.abs().max())
        if lowest >= -zero and left <= tolerance:
            return x, matrix
        if done < rounds:
            x, _ = descend(objective.slope, x, scaling_of(matrix), tolerance, steps)
    if left <= tolerance:
        raise FloatingPointError(
            f"no minimum: the gradient is {left:.2g} long, but the Hessian has an eigenvalue of {lowest:.2g}. Start "
            f"elsewhere (more epochs, another seed), or take a larger l2."
        )
    raise FloatingPointError(_missed(rounds, steps, left, tolerance))


def _missed(rounds: int, steps: int, left: float, tolerance: float) -> str:
    return (
        f"no minimum after {rounds} rounds of {steps} steps: a gradient of length {left:.2g} is left, at most {tolerance:.2g} "
        f"is asked. Take more steps or a larger l2, or ask for less."
    )


def scaling_of(hessian: Tensor) -> Tensor:
    """Return |H|^-½ for `descend`."""
    mu, vectors = torch.linalg.eigh(hessian)
    return vectors * mu.abs().clamp(min=FLOOR).rsqrt()


def descend(
    slope: Slope,
    x: Tensor,
    scaling: Tensor | None,  # (p, p): x moves by scaling × what L-BFGS moves; H^-½ makes its first step Newton's
    tolerance: float,
    steps: int,
) -> tuple[Tensor, int]:
    """Return where the gradient is at most tolerance long, or where the steps ended, and the number of evaluations."""
    y, start, length, evaluations = x.new_zeros(len(x), requires_grad=True), x, torch.inf, 0
    search = torch.optim.LBFGS([y], max_iter=PIECE, max_eval=2 * PIECE, history_size=60, tolerance_grad=0,
                               tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

    def here() -> Tensor:
        return start + (y.detach() if scaling is None else scaling @ y.detach())

    def closure() -> float:
        nonlocal length, evaluations
        value, gradient = slope(here())
        y.grad = gradient if scaling is None else scaling.T @ gradient
        length, evaluations = float(gradient.norm()), evaluations + 1
        return value

    for _ in range(-(-steps // PIECE)):
        search.step(closure)
        x = here()
        if scaling is None and float(slope(x)[1].norm()) <= tolerance:
            return x, evaluations
        if scaling is not None and length <= STALLED * tolerance:
            nearer = polished(slope, x, scaling, tolerance)
            if float(slope(nearer)[1].norm()) <= tolerance:
                return nearer, evaluations
    return x, evaluations


def polished(slope: Slope, x: Tensor, scaling: Tensor, tolerance: float) -> Tensor:
    """Return x after plain steps with the Hessian that scaling stands for, as long as they shorten the gradient.

    Near the minimum the value no longer changes in its last digit, so a line search stalls before the gradient vanishes.
    """
    gradient = slope(x)[1]
    while float(gradient.norm()) > tolerance:
        nearer = x - scaling @ (scaling.T @ gradient)
        after = slope(nearer)[1]
        if not float(after.norm()) < float(gradient.norm()):
            return x
        x, gradient = nearer, after
    return x
