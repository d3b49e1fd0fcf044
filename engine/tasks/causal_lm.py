"""Causal language models: the loss of an example's own tokens, long documents in chunks.

Consecutive chunks share one token: the last token of a chunk is the context of the next chunk's first prediction. So every
token of a document but its first is predicted exactly once, and the chunks' losses add up to the document's.
"""

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch, pad
from engine.models import load_hugging_face, start_hugging_face
from engine.tasks.text import IGNORED, as_tokens, load_tokenizer, model_inputs, text_batch, text_of, tokenised
from engine.vocabulary import token_losses


class CausalLM:
    """Loss over the example's own tokens; padding, prompt tokens and labels of −100 are masked."""

    granularity = "chunk"

    def __init__(
        self,
        tokenizer: str,  # folder of the tokenizer
        model: str | None = None,
        text_field: str = "text",
        prompt_field: str | None = None,  # text in front that is read but not predicted
        max_tokens: int = 512,  # of a chunk
        reduction: str = "sum",  # "sum" or "mean" over the example's tokens
        append_end: bool = True,  # the end-of-text token is predicted too
        attention: str = "sdpa",
        base: str | None = None,  # folder of the model that a LoRA adapter was trained on; None: what the adapter says
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"task.settings.reduction={reduction!r} is not allowed: 'sum' or 'mean'")
        if max_tokens < 2:
            raise ValueError(
                f"task.settings.max_tokens={max_tokens} is not allowed: at least 2, or nothing is predicted"
            )
        self.tokenizer = load_tokenizer(Path(tokenizer))
        self.text_field, self.prompt_field = text_field, prompt_field
        self.max_tokens, self.reduction, self.append_end, self.attention = max_tokens, reduction, append_end, attention
        self.base = base

    def build(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return load_hugging_face(folder, AutoModelForCausalLM, self.attention, self.base)

    def initialise(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return start_hugging_face(folder, AutoModelForCausalLM)

    def encode(self, record: dict) -> list[dict]:
        tokens, counted = self._tokens(record)
        counted[:1] = 0  # nothing stands before the first token to predict it from
        if not counted.any():
            raise ValueError(
                "the example has no loss-bearing token: it needs at least one unmasked token after the first"
            )
        step = self.max_tokens - 1
        chunks = [slice(start, start + self.max_tokens) for start in range(0, max(1, len(tokens) - 1), step)]
        own_text = len(chunks) > 1 and self.text_field in record
        return [self._row(tokens[c], counted[c], own_text) for c in chunks if counted[c][1:].any()]

    def _row(self, tokens: np.ndarray, counted: np.ndarray, own_text: bool) -> dict:
        """Return what the row of one chunk adds; a chunk keeps its own text in place of the whole document's."""
        row: dict = {"input_ids": tokens, "counted": np.append(0, counted[1:]).astype(np.uint8)}
        return row | {self.text_field: self.tokenizer.decode(tokens, skip_special_tokens=True)} if own_text else row

    def _tokens(self, record: dict) -> tuple[np.ndarray, np.ndarray]:
        """Return the document's token ids and which of them the loss counts."""
        if record.get("input_ids") is not None:
            return tokenised(record)
        prompt: list[int] = []
        if self.prompt_field:
            prompt = self.tokenizer(text_of(record, self.prompt_field), verbose=False)["input_ids"]
        own = self.tokenizer(text_of(record, self.text_field), add_special_tokens=not prompt, verbose=False)[
            "input_ids"
        ]
        end = [self.tokenizer.eos_token_id] if self.append_end and self.tokenizer.eos_token_id is not None else []
        tokens = as_tokens([*prompt, *own, *end])
        if not len(tokens):
            raise ValueError(f"field {self.text_field!r} has no tokens: {record.get(self.text_field)!r}")
        return tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)

    def collate(self, rows: list[dict]) -> Batch:
        padding = self.tokenizer.pad_token_id
        return text_batch(
            rows, padding if padding is not None else 0, {"counted": pad([r["counted"] for r in rows], 0)}
        )

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return [B, T]: every token's part of its example's loss, 0 where nothing is predicted."""
        counted = batch["counted"][:, 1:]
        labels = batch["input_ids"][:, 1:].masked_fill(counted == 0, IGNORED)
        each = token_losses(model, model_inputs(batch), F.pad(labels, (0, 1), value=IGNORED))[:, :-1]
        each = F.pad(each, (1, 0))  # the first token is predicted from nothing
        return each / counted.sum(1, keepdim=True) if self.reduction == "mean" else each

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.token_losses(model, batch).sum(1)
