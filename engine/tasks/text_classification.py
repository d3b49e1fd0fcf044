"""Text classification: one cross-entropy per text, on a Hugging Face sequence classifier."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch
from engine.models import load_hugging_face, start_hugging_face
from engine.tasks.labels import Labels
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


class TextClassification:
    """Texts longer than max_tokens are cut, and counted at ingest."""

    def __init__(
        self,
        tokenizer: str,  # folder of the tokenizer
        model: str | None = None,  # folder whose config.json names the classes; None: any whole number is taken
        text_field: str = "text",
        label_field: str = "label",
        labels: list[str] | None = None,  # class names in index order, where the corpus has names
        max_tokens: int = 512,
        attention: str = "sdpa",
        base: str | None = None,  # folder of the model that a LoRA adapter was trained on; None: what the adapter says
    ) -> None:
        self.tokenizer = load_tokenizer(Path(tokenizer))
        self.labels = Labels(Path(model) if model else None, labels)
        self.text_field, self.label_field = text_field, label_field
        self.max_tokens, self.attention = max_tokens, attention
        self.base = base

    def build(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model = load_hugging_face(
            folder, AutoModelForSequenceClassification, self.attention, self.base, **self._classes()
        )
        return padded_alike(model, self.tokenizer)

    def initialise(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model = start_hugging_face(folder, AutoModelForSequenceClassification, **self._classes())
        return padded_alike(model, self.tokenizer)

    def _classes(self) -> dict[str, int]:
        return {"num_labels": self.labels.count} if self.labels.count else {}

    def encode(self, record: dict) -> list[dict]:
        text = text_of(record, self.text_field)
        target = self.labels.index(record.get(self.label_field), self.label_field)
        kept, truncated = cut_tokens(self.tokenizer, text, self.max_tokens)
        return [{"input_ids": kept, "target": target, "truncated": truncated}]

    def collate(self, rows: list[dict]) -> Batch:
        return text_batch(rows, padding_id(self.tokenizer), {"target": targets(rows)})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**model_inputs(batch)).logits
        if logits.shape[1] <= int(batch["target"].max()):
            raise ValueError(f"label {int(batch['target'].max())} is outside the model's {logits.shape[1]} classes")
        return F.cross_entropy(wide(logits), batch["target"], reduction="none")

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        with torch.inference_mode():
            return [self.labels.name(i) for i in model(**model_inputs(batch)).logits.argmax(-1).tolist()]
