"""Instance-specific dropout masks: m(z) and its flip, drawn anew from integers whenever they are asked for.

A mask is a function of (seed, layer, id) alone: the same bits on every worker, device, dtype and batch order, and nothing
per example is ever stored. Owns the bits, their scale and the average over mask seeds; where masks go is in turnover.py.
Source: Kobayashi et al. 2020, sections 3.1-3.3 and appendix C.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from engine.counters import derive_key

Side = Literal["own", "flipped"]  # m(z), the sub-network that learns z; m̃(z), the one that never does
_WORDS = 4  # 32-bit words that one Philox counter yields
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_UNSEEN = 1 << 41  # no corpus has an id from here on


@dataclass(frozen=True)
class MaskSettings:
    """How masks are drawn; with the layers' names this is all that there is to know about them."""

    keep: float = 0.5  # p, the probability that a unit is kept
    flip_scale: str = "paper"  # of m̃: 1/p as equation 2 has it | unbiased: 1/(1 − p), so that its mean is 1 as m's is
    kind: str = "volatile"  # every id's bits by themselves | hashed: products of rows of a codebook
    seed: int = 0
    codebook: int = 256  # K, hashed only: primitive masks
    picks: int = 4  # k, hashed only: how many of them an id multiplies

    def __post_init__(self) -> None:
        if not 0.0 < self.keep < 1.0:
            raise ValueError(f"masks.keep={self.keep} is not allowed: must be between 0 and 1. The default is 0.5.")
        for name, value, known in (
            ("flip_scale", self.flip_scale, ("paper", "unbiased")),
            ("kind", self.kind, tuple(_DRAWS)),
        ):
            if value not in known:
                raise ValueError(f"masks.{name}={value!r} is not known: use one of {', '.join(known)}.")
        if not 0 < self.picks <= self.codebook:
            raise ValueError(
                f"masks.picks={self.picks} is not allowed: an id takes 1 to masks.codebook={self.codebook} different rows."
            )

    def scale(self, side: Side) -> float:
        """Return what a kept unit is multiplied with."""
        unbiased = side == "flipped" and self.flip_scale == "unbiased"
        return 1.0 / (1.0 - self.keep) if unbiased else 1.0 / self.keep


class Masks:
    """Draws the bits of masks. Holds the settings and, of the hashed kind, a codebook: never anything per example.

    `duplicates`, int64 [D, 2]: (example id, mask id) of examples that share another one's mask, because the same text
    would otherwise be learned by a sub-network that is said never to have seen it.
    """

    def __init__(self, settings: MaskSettings, duplicates: Tensor | None = None) -> None:
        self.settings = settings
        pairs = torch.zeros(0, 2, dtype=torch.int64) if duplicates is None else duplicates.long().cpu()
        self.duplicates = pairs[pairs[:, 0].argsort()]
        self._codebook = torch.zeros(0, 0, dtype=torch.bool)  # bool [K, width of the widest layer so far]

    def bits(
        self,
        ids: Tensor,  # int64 [n], example ids, >= 0
        widths: Mapping[str, int],  # layer -> units
    ) -> dict[str, Tensor]:  # layer -> bool [n, width] on the ids' device: the units that m(z) keeps
        """Return m′(z) of every layer."""
        return _DRAWS[self.settings.kind](self, self.mask_ids(ids), widths) if widths else {}

    def mask_ids(self, ids: Tensor) -> Tensor:
        """Return the ids whose masks these examples have: their own, but for duplicates."""
        if not len(self.duplicates):
            return ids
        examples, shared = self.duplicates.to(ids.device).T.contiguous()
        place = torch.searchsorted(examples, ids).clamp(max=len(examples) - 1)
        return torch.where(examples[place] == ids, shared[place], ids)

    def codebook(self, width: int, device: torch.device) -> Tensor:
        """Return the K primitive masks, bool [K, at least width]; made anew where none is wide enough: it is volatile too."""
        if self._codebook.shape[1] < width or self._codebook.device != device:
            with torch.inference_mode(False):  # it outlives the call that first asks for it
                rows = torch.arange(self.settings.codebook, device=device)
                drawn = _words(rows, [(derive_key(self.settings.seed, "codebook"), -(-width // _WORDS))])
                self._codebook = drawn < _threshold(self.settings.keep ** (1.0 / self.settings.picks))
        return self._codebook


def factor(bits: Tensor, side: Side, settings: MaskSettings, dtype: torch.dtype) -> Tensor:
    """Return m(z) ∈ {0, 1/p} or its flip m̃(z) = 1/p − m(z), in the shape of the bits."""
    return (bits if side == "own" else ~bits).to(dtype) * settings.scale(side)


def _volatile(masks: Masks, ids: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Every unit's own word is below p: one call of the generator for all layers, whose memory grows with the batch."""
    blocks = [-(-width // _WORDS) for width in widths.values()]
    keys = [derive_key(masks.settings.seed, "mask", layer) for layer in widths]
    kept = _words(ids, list(zip(keys, blocks, strict=True))) < _threshold(masks.settings.keep)
    parts = kept.split([_WORDS * count for count in blocks], dim=1)
    return {layer: part[:, :width] for (layer, width), part in zip(widths.items(), parts, strict=True)}


def _hashed(masks: Masks, ids: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The product of k codebook rows, drawn for (layer, id) without replacement; each row keeps p^(1/k).

    Memory O(K · width) whatever the number of examples. The paper's text has 1 − p^(1/k) for the rows' rate of ones, whose
    product is not p: it is their rate of zeros. Rows drawn with replacement would keep more than p.
    """
    total, count = masks.settings.codebook, masks.settings.picks
    codebook = masks.codebook(max(widths.values()), ids.device)
    blocks = -(-count // _WORDS)
    words = _words(ids, [(derive_key(masks.settings.seed, "picks", layer), blocks) for layer in widths])
    rows = _distinct(words.view(len(ids) * len(widths), -1), total, count).view(len(ids), len(widths), count)
    return {
        layer: reduce(torch.bitwise_and, (codebook[rows[:, place, pick], :width] for pick in range(count)))
        for place, (layer, width) in enumerate(widths.items())
    }


_DRAWS = {"volatile": _volatile, "hashed": _hashed}


def _distinct(words: Tensor, total: int, count: int) -> Tensor:
    """Return int64 [n, count]: a uniformly random set of different numbers below `total`, by Floyd's algorithm."""
    chosen = torch.empty(len(words), 0, dtype=torch.int64, device=words.device)
    for position, last in enumerate(range(total - count, total)):
        drawn = (words[:, position] * (last + 1)) >> 32
        taken = (chosen == drawn[:, None]).any(1)
        chosen = torch.cat([chosen, torch.where(taken, last, drawn)[:, None]], 1)
    return chosen


def _threshold(probability: float) -> int:
    """Return the number below which a 32-bit word falls with this probability."""
    return round(probability * 2**32)


def _words(
    ids: Tensor,  # int64 [n]
    streams: Sequence[tuple[int, int]],  # (128-bit key, number of counters) of every stream
) -> Tensor:  # int64 [n, 4 · counters of all streams], 32-bit words
    """Return the first words of each id's part of every stream. The id is one half of the counter."""
    device = ids.device
    lengths = torch.tensor([length for _, length in streams], device=device)
    key = [
        torch.tensor([name >> shift & _LOW for name, _ in streams], device=device).repeat_interleave(lengths)
        for shift in (0, 32)
    ]
    block = torch.cat([torch.arange(length, device=device) for _, length in streams])
    low, high = (ids & _LOW)[:, None], (ids >> 32)[:, None]
    words = philox((block, torch.zeros_like(block), low, high), (key[0], key[1]))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # int64 that hold 32-bit words; broadcast with each other
    key: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 (Salmon et al. 2011) of every counter, as int64 that hold 32-bit words.

    Integers only, so every device gives the same bits; products of two words wrap in int64 and keep all 64 bits.
    """
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32 & _LOW) ^ b ^ k, second & _LOW, (first >> 32 & _LOW) ^ d ^ l, first & _LOW
        k, l = k + _WEYL[0] & _LOW, l + _WEYL[1] & _LOW  # noqa: E741
    return a, b, c, d


def unseen_ids(count: int, start: int = 0) -> Tensor:
    """Return int64 [count] ids that no corpus has: their masks are random, and no training has seen them."""
    return torch.arange(_UNSEEN + start, _UNSEEN + start + count)


def duplicate_pairs(
    ids: Tensor,  # int64 [n]
    groups: Sequence[int],  # of each example, the position of its group's first: duplicates.near_identical
) -> Tensor:  # int64 [D, 2], (example id, mask id)
    """Return the pairs that let every example of a group share the mask of its first one."""
    first = ids[torch.tensor(groups, dtype=torch.int64)]
    return torch.stack([ids, first], 1)[first != ids]


def average(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return mean and standard error over R mask seeds, float64 in the blocks' shape; no error for a single one.

    The blocks come from R trainings, one per mask seed: a trained network can be asked only with the masks it learned
    under. One block is held beside the two sums (Welford 1962).
    """
    mean, squares, count = torch.zeros(()), torch.zeros(()), 0
    for block in blocks:
        count += 1
        step = block.double() - mean
        mean = mean + step / count
        squares = squares + step * (block.double() - mean)
    if not count:
        raise ValueError("no mask seed is there to average over: at least one block is needed.")
    return mean, (squares / (count - 1) / count).sqrt() if count > 1 else None
