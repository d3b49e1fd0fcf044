"""Which checkpoints TracInCP sums over: the advice of TracIn's appendix D (Pruthi et al. 2020) as a rule on the loss curve.

Checkpoints are taken where the loss falls steadily, more of them where it falls faster, none from the noisy start and none
after convergence. Only the order of the losses and their differences count: neither their unit nor their level does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONVERGED = 0.95  # share of the whole fall after which the training counts as converged


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is kept, and why or why not."""

    kept: bool
    why: str


def logged_since(
    steps: Sequence[int],  # of the checkpoints, rising
    curve: Sequence[tuple[int, float]],  # logged (step, loss)
) -> list[list[tuple[int, float]]]:
    """Return for every checkpoint what was logged since the one before it; the first looks back as far as the second."""
    reach = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    return [
        [(step, loss) for step, loss in curve if begin < step <= end]
        for begin, end in zip([steps[0] - reach, *steps], steps, strict=False)
    ]


def losses_at(
    steps: Sequence[int],
    curve: Sequence[tuple[int, float]],
) -> list[float | None]:
    """Return every checkpoint's loss: the mean of what was logged since the one before it, None where nothing was.

    Raises ValueError for a logged loss among them that is not finite.
    """
    found: list[float | None] = []
    for here in logged_since(steps, curve):
        for step, loss in here:
            if not math.isfinite(loss):
                raise ValueError(
                    f"checkpoints.choose is not possible: the loss logged at step {step} is {loss}. List the "
                    f"checkpoints to use under checkpoints.path instead."
                )
        found.append(math.fsum(loss for _, loss in here) / len(here) if here else None)
    return found


def choose_checkpoints(losses: Sequence[float | None], count: int) -> list[Verdict]:
    """Return a verdict for every checkpoint, `count` of them kept. `losses` are theirs in order, None: not known.

    The fall from the end of the noisy start to the lowest loss is cut at 95 % and divided into `count` equal parts; kept
    is, of the checkpoints that reached a new low, the first to complete each part. Raises ValueError if there are fewer
    such checkpoints than asked for.
    """
    known = [(i, loss) for i, loss in enumerate(losses) if loss is not None]
    why = {i: "no loss is logged since the checkpoint before it" for i, loss in enumerate(losses) if loss is None}
    begin = noisy_start([loss for _, loss in known])
    start = (
        "noisy start: more than half of the decrease was lost again" if begin else "first: nothing to compare it with"
    )
    why |= {i: start for i, _ in known[: begin + 1]}
    top = best = min((loss for _, loss in known[: begin + 1]), default=0.0)
    whole = CONVERGED * (top - min((loss for _, loss in known), default=0.0))
    steady: list[tuple[int, float]] = []
    for i, loss in known[begin + 1 :]:
        if whole > 0 and best <= top - whole:
            why[i] = f"training has converged: {CONVERGED:.0%} of the fall of the loss was over before it"
        elif loss >= best:
            why[i] = f"no decrease: the loss was {best:.4g} before it"
        else:
            steady.append((i, loss))
            best = loss
    if len(steady) < count:
        raise ValueError(
            f"checkpoints.choose={count} is not allowed: of {len(losses)} checkpoints {len(steady)} lie where the logged "
            f"loss falls steadily ({_reasons(why)}). Choose at most that many, or save and log more often in training."
        )
    kept = dict(zip(_spread([loss for _, loss in steady], top, whole, count), range(1, count + 1), strict=True))
    for position, (i, _) in enumerate(steady):
        why[i] = f"part {kept[position]} of {count} of the fall" if position in kept else "between two that are kept"
    chosen = {steady[position][0] for position in kept}
    return [Verdict(i in chosen, why[i]) for i in range(len(losses))]


def noisy_start(losses: Sequence[float]) -> int:
    """Return the position at which the noisy start ends: there, for the last time before the lowest loss, training lost
    again more than half of all that it had gained. 0 if it never did."""
    end = 0
    for i in range(1, losses.index(min(losses)) if losses else 0):
        if losses[i] > (losses[0] + min(losses[:i])) / 2:
            end = i
    return end


def _spread(losses: Sequence[float], top: float, whole: float, count: int) -> list[int]:
    """Return `count` positions in falling losses: the first to complete each equal part, enough left for those after."""
    chosen = [-1]
    for part in range(1, count + 1):
        last = len(losses) - 1 - (count - part)
        open_ = range(chosen[-1] + 1, last + 1)
        chosen.append(next((p for p in open_ if losses[p] <= top - whole * part / count), last))
    return chosen[1:]


def _reasons(why: dict[int, str]) -> str:
    """Return how many checkpoints were left out for each reason, in the words before its colon."""
    names = [reason.partition(":")[0] for reason in why.values()]
    return ", ".join(f"{names.count(name)}: {name}" for name in dict.fromkeys(names)) or "none was left out"
