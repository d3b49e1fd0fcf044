"""Tokenizers and padded text batches, shared by the tasks that read text."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import Batch, collate_ids, pad

_FILES = ("tokenizer.json", "vocab.txt", "tokenizer.model", "vocab.json", "spiece.model")


@cache
def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in _FILES):
        raise ValueError(f"{folder} holds no tokenizer: set task.tokenizer to a folder that does")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def text_of(record: dict, field: str) -> str:
    """Return a record's text. Raises ValueError naming the field and those there are."""
    text = record.get(field)
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {text!r}, a text is needed. The record has {', '.join(sorted(record))}.")
    return text


def text_batch(rows: list[dict], padding: int, extra: dict[str, Tensor]) -> Batch:
    """Return token ids and attention mask [B, T], with what else the task puts beside them."""
    tokens = [row["input_ids"] for row in rows]
    mask = pad([np.ones(len(t), dtype=np.int64) for t in tokens], 0)
    return Batch(collate_ids(rows), {"input_ids": pad(tokens, padding), "attention_mask": mask} | extra)


def padding_id(tokenizer: Any) -> int:
    """Return the token that pads a batch: the tokenizer's own, else its end of text, else 0."""
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
    return int(known[0]) if known else 0


def padded_alike(model: nn.Module, tokenizer: Any) -> nn.Module:
    """Return the model told which token pads: some pool the last token before it, which must not be our padding."""
    model.config.pad_token_id = padding_id(tokenizer)  # type: ignore[union-attr]
    return model


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def cut_tokens(tokenizer: Any, text: str, max_tokens: int) -> tuple[np.ndarray, bool]:
    """Return at most max_tokens ids, special tokens included, and whether the text was cut."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) <= max_tokens:
        return as_tokens(tokens), False
    return as_tokens(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]), True


def as_tokens(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def targets(rows: list[dict], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([row["target"] for row in rows], dtype=dtype)
