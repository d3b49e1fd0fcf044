"""Masked language models: the loss of hidden tokens, long documents in chunks that do not overlap.

Which tokens are hidden follows from (seed, example id, position) by integer counters (Devlin et al. 2019, section 3.1, in
place of a random draw per epoch), so an example has one loss, whatever batch, worker or device it is on. A new query has
the id −1.
"""

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from engine.batches import Batch, pad
from engine.counters import derive_key, words
from engine.limits import read_limits
from engine.models import load_hugging_face, start_hugging_face
from engine.tasks.text import (
    IGNORED,
    as_tokens,
    load_tokenizer,
    model_inputs,
    padding_id,
    text_batch,
    text_of,
    tokenised,
    wrapping,
)
from engine.vocabulary import token_losses

_REPLACED, _RANDOM = 0.8, 0.1  # of the chosen tokens: [MASK], any token; the rest stay and are predicted all the same


class MaskedLM:
    """Loss over chosen tokens, never over special ones; every example has at least one. Labels of −100 are never chosen."""

    granularity = "chunk"

    def __init__(
        self,
        tokenizer: str,  # folder of the tokenizer
        model: str | None = None,  # folder with the model's config.json, whose vocabulary bounds the random tokens
        text_field: str = "text",
        max_tokens: int = 512,  # of a chunk, special tokens included
        mask_share: float = 0.15,  # chance of a token to be chosen
        masking: str = "bert",  # "bert": 80 % [MASK], 10 % any token, 10 % kept, as models are trained; "mask": all [MASK]
        seed: int = 0,  # of the choice
        reduction: str = "sum",  # "sum" or "mean" over the chosen tokens
        attention: str = "sdpa",
        base: str | None = None,  # folder of the model that a LoRA adapter was trained on; None: what the adapter says
    ) -> None:
        self.tokenizer = load_tokenizer(Path(tokenizer))
        self.front, self.back = wrapping(self.tokenizer)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"task.settings.reduction={reduction!r} is not allowed: 'sum' or 'mean'")
        if masking not in ("bert", "mask"):
            raise ValueError(f"task.settings.masking={masking!r} is not allowed: 'bert' or 'mask'")
        if not 0 < mask_share <= 1:
            raise ValueError(f"task.settings.mask_share={mask_share} is not allowed: above 0, at most 1")
        if max_tokens <= len(self.front) + len(self.back):
            least = len(self.front) + len(self.back) + 1
            raise ValueError(
                f"task.settings.max_tokens={max_tokens} is not allowed: at least {least}, special tokens too"
            )
        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer in {tokenizer} has no mask token: use task causal-lm, or its model's own")
        known = read_limits(Path(model)).vocabulary if model else None
        self.vocabulary = min(len(self.tokenizer), known or len(self.tokenizer))  # one may hold tokens the other lacks
        self.special = np.array(self.tokenizer.all_special_ids)
        self.text_field, self.max_tokens, self.attention = text_field, max_tokens, attention
        self.base = base
        self.mask_share, self.masking, self.seed, self.reduction = mask_share, masking, seed, reduction

    def build(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForMaskedLM

        return load_hugging_face(folder, AutoModelForMaskedLM, self.attention, self.base)

    def initialise(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForMaskedLM

        return start_hugging_face(folder, AutoModelForMaskedLM)

    def encode(self, record: dict) -> list[dict]:
        tokens, counted = self._tokens(record)
        counted = counted & ~np.isin(tokens, self.special)
        if not counted.any():
            raise ValueError("the example has no token that can be masked: it needs one that is no special token")
        step = self.max_tokens - len(self.front) - len(self.back)
        chunks = [slice(start, start + step) for start in range(0, len(tokens), step)]
        own_text = len(chunks) > 1 and self.text_field in record
        return [self._row(tokens[c], counted[c], own_text) for c in chunks if counted[c].any()]

    def _row(self, tokens: np.ndarray, counted: np.ndarray, own_text: bool) -> dict:
        """Return what the row of one chunk adds; a chunk keeps its own text in place of the whole document's."""
        front, back = np.zeros(len(self.front), np.uint8), np.zeros(len(self.back), np.uint8)
        row: dict = {
            "input_ids": np.concatenate([self.front, tokens, self.back]),
            "counted": np.concatenate([front, counted.astype(np.uint8), back]),
        }
        return row | {self.text_field: self.tokenizer.decode(tokens, skip_special_tokens=True)} if own_text else row

    def _tokens(self, record: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return the document's tokens without those that wrap it, and which of them may be chosen."""
        if record.get("input_ids") is None:
            text = text_of(record, self.text_field)
            tokens = as_tokens(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            return tokens, np.ones(len(tokens), dtype=bool)
        tokens, counted = tokenised(record)
        inner = slice(len(self.front), len(tokens) - len(self.back))
        wrapped = np.concatenate([self.front, tokens[inner], self.back])
        if np.array_equal(wrapped, tokens):
            tokens, counted = tokens[inner], counted[inner]
        return tokens, counted.astype(bool)

    def collate(self, rows: list[dict]) -> Batch:
        hidden = [self._hide(row) for row in rows]
        seen = [row | {"input_ids": tokens} for row, (tokens, _) in zip(rows, hidden, strict=True)]
        return text_batch(seen, padding_id(self.tokenizer), {"labels": pad([labels for _, labels in hidden], IGNORED)})

    def _hide(self, row: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return what the model sees of an example and its labels, −100 where nothing is predicted."""
        tokens, counted = np.asarray(row["input_ids"]), np.asarray(row["counted"]).astype(bool)
        drawn = words(derive_key(self.seed, "masked-lm", int(row.get("id", -1))), 0, 3 * len(tokens)).reshape(-1, 3)
        chosen = choose(uniform(drawn[:, 0]), counted, self.mask_share)
        if self.masking == "mask":
            return np.where(chosen, self.tokenizer.mask_token_id, tokens), np.where(chosen, tokens, IGNORED)
        fate = uniform(drawn[:, 1])
        any_token = (drawn[:, 2] % np.uint64(self.vocabulary)).astype(tokens.dtype)
        changed = np.where(fate < _REPLACED + _RANDOM, any_token, tokens)
        changed = np.where(fate < _REPLACED, self.tokenizer.mask_token_id, changed)
        return np.where(chosen, changed, tokens), np.where(chosen, tokens, IGNORED)

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return [B, T]: every token's part of its example's loss, 0 where nothing is predicted."""
        each = token_losses(model, model_inputs(batch), batch["labels"])
        return each / (batch["labels"] != IGNORED).sum(1, keepdim=True) if self.reduction == "mean" else each

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.token_losses(model, batch).sum(1)


def choose(drawn: np.ndarray, allowed: np.ndarray, share: float) -> np.ndarray:
    """Return bool [T]: allowed positions whose draw from [0, 1) is below the share; the lowest draw always is."""
    lowest = drawn[allowed].min()
    return allowed & ((drawn < share) | (drawn == lowest))


def uniform(drawn: np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1) from 64-bit words."""
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53
