"""Image classification: a Hugging Face model, or a plain torch module that maps [B, C, H, W] to logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.batches import Batch, collate_ids
from engine.models import load_hugging_face, load_torch, needed, start_hugging_face, start_torch
from engine.tasks.labels import Labels
from engine.tasks.text import targets, wide


class ImageClassification:
    """Pixels are scaled to [0, 1], then normalised by mean and std per channel."""

    def __init__(
        self,
        factory: str | None = None,  # package.module:function that returns a torch module; None: a Hugging Face model
        model: str | None = None,  # folder whose config.json names the classes
        image_field: str = "images",
        label_field: str = "labels",
        labels: list[str] | None = None,
        classes: int | None = None,  # number of classes, where no config.json says it
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        attention: str = "sdpa",
        base: str | None = None,  # folder of the model that a LoRA adapter was trained on; None: what the adapter says
    ) -> None:
        self.factory, self.attention = factory, attention
        self.base = base
        self.labels = Labels(Path(model) if model else None, labels, classes)
        self.image_field, self.label_field = image_field, label_field
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def build(self, folder: Path) -> nn.Module:
        if self.factory:
            return load_torch(folder, self.factory)
        from transformers import AutoModelForImageClassification

        return load_hugging_face(folder, AutoModelForImageClassification, self.attention, self.base)

    def initialise(self, folder: Path | None) -> nn.Module:
        if self.factory:
            return start_torch(folder, self.factory)
        from transformers import AutoModelForImageClassification

        return start_hugging_face(needed(folder), AutoModelForImageClassification)

    def encode(self, record: dict) -> list[dict]:
        image = record.get(self.image_field)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
            seen = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"field {self.image_field!r} is {seen}: needs uint8 [H, W] or [H, W, C]")
        return [{"target": self.labels.index(record.get(self.label_field), self.label_field)}]

    def collate(self, rows: list[dict]) -> Batch:
        images = [np.atleast_3d(np.asarray(row[self.image_field])) for row in rows]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"images of different shapes in one batch: {sorted({i.shape for i in images})}. Resize them."
            )
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        return Batch(collate_ids(rows), {"pixels": (pixels - self.mean) / self.std, "target": targets(rows)})

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        pixels = batch["pixels"].to(next(model.parameters()).dtype)
        return wide(model(pixels) if self.factory else model(pixel_values=pixels).logits)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(model, batch), batch["target"], reduction="none")

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        with torch.inference_mode():
            return [self.labels.name(i) for i in self.logits(model, batch).argmax(-1).tolist()]
