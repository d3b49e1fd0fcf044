"""Regression: squared error of a torch module on number vectors, or of a one-output Hugging Face model on texts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import Batch, collate_ids
from engine.models import load_hugging_face, load_torch, needed, start_hugging_face, start_torch
from engine.tasks.text import (
    cut_tokens,
    load_tokenizer,
    model_inputs,
    padded_alike,
    padding_id,
    targets,
    text_batch,
    text_of,
    wide,
)


class Regression:
    """The loss is (prediction − target)². Give `factory` and `input_field`, or `tokenizer` and `text_field`."""

    def __init__(
        self,
        factory: str | None = None,  # package.module:function that returns a torch module
        input_field: str = "x",  # a list of numbers
        tokenizer: str | None = None,
        model: str | None = None,
        text_field: str = "text",
        target_field: str = "target",
        max_tokens: int = 512,
        attention: str = "sdpa",
        base: str | None = None,  # folder of the model that a LoRA adapter was trained on; None: what the adapter says
    ) -> None:
        if (factory is None) == (tokenizer is None):
            raise ValueError("task regression needs either task.settings.factory (numbers) or a tokenizer (texts)")
        self.factory, self.input_field = factory, input_field
        self.tokenizer = load_tokenizer(Path(tokenizer)) if tokenizer else None
        self.text_field, self.target_field = (text_field if tokenizer else None), target_field
        self.max_tokens, self.attention = max_tokens, attention
        self.base = base

    def build(self, folder: Path) -> nn.Module:
        if self.factory:
            return load_torch(folder, self.factory)
        from transformers import AutoModelForSequenceClassification

        model = load_hugging_face(folder, AutoModelForSequenceClassification, self.attention, self.base, num_labels=1)
        return padded_alike(model, self.tokenizer)

    def initialise(self, folder: Path | None) -> nn.Module:
        if self.factory:
            return start_torch(folder, self.factory)
        from transformers import AutoModelForSequenceClassification

        return start_hugging_face(needed(folder), AutoModelForSequenceClassification, num_labels=1)

    def encode(self, record: dict) -> list[dict]:
        target = record.get(self.target_field)
        if not isinstance(target, int | float | np.number):
            raise ValueError(f"field {self.target_field!r} is {target!r}, a number is needed")
        if self.tokenizer is None:
            numbers = np.asarray(record.get(self.input_field), dtype=object).reshape(-1)
            try:
                return [{"inputs": np.array([float(n) for n in numbers], dtype=np.float32), "target": float(target)}]
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"field {self.input_field!r} is {record.get(self.input_field)!r}, numbers needed"
                ) from error
        text = text_of(record, str(self.text_field))
        kept, truncated = cut_tokens(self.tokenizer, text, self.max_tokens)
        return [{"input_ids": kept, "target": float(target), "truncated": truncated}]

    def collate(self, rows: list[dict]) -> Batch:
        target = targets(rows, torch.float32)
        if self.tokenizer is not None:
            return text_batch(rows, padding_id(self.tokenizer), {"target": target})
        inputs = torch.tensor(np.stack([row["inputs"] for row in rows]))
        return Batch(collate_ids(rows), {"inputs": inputs, "target": target})

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.tokenizer is not None:
            out = model(**model_inputs(batch)).logits
        else:
            out = model(batch["inputs"].to(next(model.parameters()).dtype))
        return wide(out.reshape(len(batch), -1)[:, 0])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        out = self._output(model, batch)
        return (out - batch["target"].to(out.dtype)).square()

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        with torch.inference_mode():
            return self._output(model, batch).tolist()
