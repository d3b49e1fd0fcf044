"""Turn-over dropout's estimates: L(f^m̃(z), q) − L(f^m(z), q) for all z × q, forward passes alone.

Positive: the sub-network that never saw z does worse on q, so z is a proponent (equation 2 of Kobayashi et al. 2020; its
sign is the engine's). The loss may be any measurement [B]: the loss on another label of the query answers for that label;
a query set's mean is the mean over the columns. One network gives signal and the noise of its random sub-networks:
average over mask seeds (masks.average), and judge by ids that were never trained (masks.unseen_ids).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batches import Batch
from engine.masks import Side, unseen_ids
from engine.shared_prefix import Run, SharedPrefix
from engine.turnover import Loss, TurnOver, evaluating

SCORE_UNIT = "sub_network_loss"  # a difference of two losses of one trained network; not an infinitesimal


class Estimator:
    """Runs many z and q in each forward pass; what lies below the first masked layer runs once for each query."""

    def __init__(
        self,
        turnover: TurnOver,
        loss: Loss,
        rows: int = 256,  # of one forward pass: z times q
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows={rows} is not allowed: a forward pass holds at least one pair")
        self.turnover, self.loss, self.rows = turnover, loss, rows
        self._prefix = SharedPrefix(turnover.model, lambda: turnover.masked)

    def influence(self, ids: Tensor, queries: Batch) -> Tensor:  # int64 [n] -> float64 [n, Q]
        """Return L(f^m̃(z), q) − L(f^m(z), q): equation 2. Two forward rows for each pair."""
        own, flipped = self.losses(ids, queries, ("own", "flipped"))
        return flipped - own

    def influence_on_full(self, ids: Tensor, queries: Batch) -> Tensor:  # int64 [n] -> float64 [n, Q]
        """Return L(f^m̃(z), q) − L(f_D, q): footnote 4. Less biased to z, but of networks of two sizes; half the cost."""
        (flipped,) = self.losses(ids, queries, ("flipped",))
        return flipped - full_losses(self.turnover, self.loss, queries)

    def losses(
        self,
        ids: Tensor,  # int64 [n]
        queries: Batch,
        sides: Sequence[Side],
        rows: int | None = None,  # of one forward pass, where these queries allow for another number
    ) -> list[Tensor]:  # float64 [n, Q] for each side
        """Return every query's loss under every example's masks. Memory grows with `rows`, not with n."""
        if not len(ids):
            return [torch.zeros(0, len(queries), dtype=torch.float64) for _ in sides]
        with evaluating(self.turnover), torch.inference_mode():
            two = queries.take([0, min(1, len(queries) - 1)])
            self._prefix.probe(self._runner(two, ids[:1], sides[0]))
            recording = self._prefix.record(self._runner(queries, ids[:1], sides[0]))
            step = max(1, (rows or self.rows) // len(queries))
            found: list[list[Tensor]] = [[] for _ in sides]
            for some in ids.split(step):
                for side, blocks in zip(sides, found, strict=True):
                    with self._prefix.replay(recording, len(some)):
                        blocks.append(self._runner(queries, some, side)(len(some)))
            return [torch.cat(blocks) for blocks in found]

    def _runner(self, queries: Batch, ids: Tensor, side: Side) -> Run:
        """Return what runs the queries under these masks, or under one of them as often as asked: float64 [copies, Q]."""

        def run(copies: int) -> Tensor:
            self.turnover.use(ids.expand(copies), side, len(queries))
            return self.loss(self.turnover.model, repeated(queries, copies)).double().view(copies, len(queries))

        return run


def self_influence(turnover: TurnOver, loss: Loss, batch: Batch) -> Tensor:  # float64 [B]
    """Return L(f^m̃(z), z) − L(f^m(z), z) of the batch's own examples, in two forward passes."""
    return paired_losses(turnover, loss, batch, batch.ids, "flipped") - paired_losses(
        turnover, loss, batch, batch.ids, "own"
    )


def paired_losses(turnover: TurnOver, loss: Loss, batch: Batch, ids: Tensor, side: Side) -> Tensor:  # float64 [B]
    """Return each row's loss under the mask of one id."""
    with evaluating(turnover), torch.inference_mode():
        turnover.use(ids, side)
        return loss(turnover.model, batch).double()


def full_losses(turnover: TurnOver, loss: Loss, batch: Batch) -> Tensor:  # float64 [B]
    """Return each row's loss without masks, f_D."""
    with evaluating(turnover), torch.inference_mode():
        return loss(turnover.model, batch).double()


@dataclass(frozen=True)
class Curves:
    """One point of each curve of figure 2: mean losses of one moment of training, None without examples."""

    own: float | None  # training examples under m(z): falls as a training loss does
    flipped: float | None  # training examples under m̃(z): follows the test loss under random masks, without overfitting
    random: float | None  # test examples under masks of ids that no training saw
    test: float | None  # test examples, full network


def curves(turnover: TurnOver, loss: Loss, train: Sequence[Batch], test: Sequence[Batch]) -> Curves:
    """Return the four mean losses. Compare `flipped` with `random`, not with `test`: both are of sub-networks."""
    starts = [sum(len(batch) for batch in test[:i]) for i in range(len(test))]
    return Curves(
        own=_mean(paired_losses(turnover, loss, batch, batch.ids, "own") for batch in train),
        flipped=_mean(paired_losses(turnover, loss, batch, batch.ids, "flipped") for batch in train),
        random=_mean(
            paired_losses(turnover, loss, batch, unseen_ids(len(batch), start), "own")
            for batch, start in zip(test, starts, strict=True)
        ),
        test=_mean(full_losses(turnover, loss, batch) for batch in test),
    )


def repeated(batch: Batch, copies: int) -> Batch:
    """Return all rows of the batch, then all of them again, `copies` times."""
    tensors = {name: t.repeat(copies, *[1] * (t.dim() - 1)) for name, t in batch.tensors.items()}
    return Batch(batch.ids.repeat(copies), tensors)


def _mean(losses: Iterator[Tensor]) -> float | None:
    found = list(losses)
    return float(torch.cat(found).mean()) if found else None
