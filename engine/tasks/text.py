"""Tokenizers and padded text batches, shared by the tasks that read text."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import Batch, collate_ids, pad

IGNORED = -100  # a label that no loss counts
_FILES = ("tokenizer.json", "vocab.txt", "tokenizer.model", "vocab.json", "spiece.model")


@cache
def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    if not holds_tokenizer(folder):
        raise ValueError(f"{folder} holds no tokenizer: set task.tokenizer to a folder that does")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES)


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


def wide(logits: Tensor) -> Tensor:
    """Return the logits in at least float32: losses are never taken in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def wrapping(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the special tokens that the tokenizer puts before and behind every text."""
    own, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    front = next(i for i in range(len(whole)) if whole[i : i + len(own)] == own)
    return as_tokens(whole[:front]), as_tokens(whole[front + len(own) :])


def tokenised(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a record that holds them, without padding, and which of them its labels count."""
    tokens = as_tokens(record["input_ids"])
    found = {name: record.get(name) for name in ("labels", "attention_mask")}
    for name, value in found.items():
        if value is not None and len(value) != len(tokens):
            raise ValueError(f"field {name!r} has {len(value)} entries for {len(tokens)} in 'input_ids'")
    labels = tokens if found["labels"] is None else np.asarray(found["labels"])
    counted = labels != IGNORED
    if (labels != tokens)[counted].any():
        raise ValueError(
            "field 'labels' is neither -100 nor the token of 'input_ids' somewhere: it must be one of them"
        )
    if found["attention_mask"] is not None:
        kept = np.asarray(found["attention_mask"]) != 0
        tokens, counted = tokens[kept], counted[kept]
    return tokens, counted.astype(np.uint8)
