"""What the experiments train and attribute: a data set as tensors in its parts, and the classifier that goes with it.

    mnist     digits, a multi-layer perceptron
    movie     movie reviews, the top layers of MiniLM with a new head; its lower layers are frozen, so they run once
    glosses   WordNet glosses of 45 classes, a multi-layer perceptron on MiniLM's mean output

Parts are cut in file order and are disjoint. Losses are one cross-entropy per example.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForSequenceClassification

from engine.batches import Batch, pad, plan_batches
from engine.models import ready_for_scoring, start_hugging_face
from engine.tasks.text import cut_tokens, load_tokenizer, padding_id
from storage.locations import Location

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("train", "dev", "test")
TOKEN_BUDGET = 1024
State = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One part of a data set."""

    inputs: Tensor | list[Tensor]  # [n, width], or one [T, width] per text
    labels: Tensor  # int64 [n]

    @property
    def lengths(self) -> np.ndarray:
        """Return int64 [n]: tokens of each example, 1 where it is one vector."""
        if isinstance(self.inputs, Tensor):
            return np.ones(len(self.inputs), dtype=np.int64)
        return np.array([len(tokens) for tokens in self.inputs])

    def batch(self, rows: Tensor) -> Batch:
        """Return these rows, their positions as ids; texts padded."""
        target = {"target": self.labels[rows]}
        if isinstance(self.inputs, Tensor):
            return Batch(rows, {"x": self.inputs[rows]} | target)
        chosen = [self.inputs[i] for i in rows.tolist()]
        mask = pad([np.ones(len(tokens), dtype=np.int64) for tokens in chosen], 0)
        return Batch(rows, {"x": pad_sequence(chosen, batch_first=True), "mask": mask} | target)

    def batches(self) -> Iterator[Batch]:
        """Yield the whole part, rows of similar length together."""
        for rows in plan_batches(self.lengths, TOKEN_BUDGET):
            yield self.batch(torch.from_numpy(rows))

    def take(self, rows: Tensor) -> "Part":
        """Return these rows as a part of their own."""
        picked = self.inputs[rows] if isinstance(self.inputs, Tensor) else [self.inputs[i] for i in rows.tolist()]
        return Part(picked, self.labels[rows])


@dataclass(frozen=True)
class Subject:
    """A data set and the model that is trained on it."""

    parts: dict[str, Part]  # train, dev, test
    build: Callable[[], nn.Module]  # what training starts from; new weights follow torch's seed
    classes: int

    def load(self, state: State) -> nn.Module:
        """Return the model with these weights, ready for scoring."""
        model = self.build()
        model.load_state_dict(state)
        return ready_for_scoring(model, torch.device("cpu"), torch.float32)


def seeded_cells(config: dict[str, Any]) -> list[str]:
    """Return a cell for every data set and seed of a config."""
    return [f"{name}-seed-{seed}" for name in config["sets"] for seed in config["seeds"]]


def set_and_seed(cell: str) -> tuple[str, int]:
    name, _, seed = cell.partition("-seed-")
    return name, int(seed)


def of_set(name: str, done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one data set's results, a seed each."""
    return [result for cell, result in done.items() if set_and_seed(cell)[0] == name]


def make_subject(name: str, config: dict[str, Any]) -> Subject:
    return {"mnist": digits, "movie": reviews, "glosses": glosses}[name](config)


def digits(config: dict[str, Any]) -> Subject:
    """Return MNIST: pixels in [0, 1], flat, and an MLP of config's widths."""
    with np.load(ROOT / config["data"]) as data:
        images = torch.from_numpy(data["images"]).flatten(1).float() / 255
        labels = torch.from_numpy(data["labels"]).long()
    parts = {name: Part(images[rows], labels[rows]) for name, rows in bounds(config["rows"]).items()}
    return Subject(parts, partial(mlp, [784, *config["widths"], 10]), 10)


def reviews(config: dict[str, Any]) -> Subject:
    """Return movie reviews as the output of MiniLM's lower layers, and the layers above with a head of two classes.

    Only clearly rated ones: a review whose mean rating is near zero has no label that could be wrong.
    """
    parts = {}
    for part in PARTS:
        records = read_records(config["data"].format(part=part))
        records = [record for record in records if abs(record["score"]) >= config["least_score"]][
            : config["rows"][part]
        ]
        texts = tuple(record["text"] for record in records)
        states = token_states(config["base"], -config["top_layers"], texts, config["max_tokens"])
        parts[part] = Part(states, torch.tensor([record["label"] for record in records]))
    return Subject(parts, partial(top_layers, config["base"], config["top_layers"], 2), 2)


def glosses(config: dict[str, Any]) -> Subject:
    """Return glosses as MiniLM's output averaged over their tokens, classes in alphabetical order, and an MLP."""
    records = read_records(config["data"])[: sum(config["rows"].values())]
    names = gloss_classes(records)
    states = token_states(config["base"], None, tuple(record["text"] for record in records), config["max_tokens"])
    features = torch.stack([tokens.mean(0) for tokens in states])
    labels = torch.tensor([names.index(record["label"]) for record in records])
    parts = {name: Part(features[rows], labels[rows]) for name, rows in bounds(config["rows"]).items()}
    return Subject(parts, partial(mlp, [features.shape[1], *config["widths"], len(names)]), len(names))


def gloss_classes(records: list[dict[str, Any]]) -> list[str]:
    return sorted({record["label"] for record in records})


def bounds(rows: dict[str, int]) -> dict[str, slice]:
    """Return where each part stands in the file, one after the other."""
    stops = np.cumsum([0, *(rows[name] for name in PARTS)]).tolist()
    return {name: slice(*ends) for name, ends in zip(PARTS, pairwise(stops), strict=True)}


def read_records(file: str) -> list[dict[str, Any]]:
    with gzip.open(ROOT / file, "rt") as lines:
        return [json.loads(line) for line in lines]


@lru_cache(maxsize=3)
def token_states(base: str, layers: int | None, texts: tuple[str, ...], max_tokens: int) -> list[Tensor]:
    """Return per text the output [T, H] of the encoder's layers[:layers], without dropout; None: all of them."""
    folder = fetch(base)
    tokenizer = load_tokenizer(folder)
    model = start_hugging_face(folder, AutoModel).eval()
    model.encoder.layer = model.encoder.layer[:layers]  # type: ignore[union-attr, index]
    tokens = [cut_tokens(tokenizer, text, max_tokens)[0] for text in texts]
    states: dict[int, Tensor] = {}
    with torch.no_grad():
        for rows in plan_batches(np.array([len(ids) for ids in tokens]), TOKEN_BUDGET):
            chosen = [tokens[i] for i in rows]
            mask = pad([np.ones(len(ids), dtype=np.int64) for ids in chosen], 0)
            out = model(input_ids=pad(chosen, padding_id(tokenizer)), attention_mask=mask).last_hidden_state
            states |= {int(i): out[k, : len(tokens[i])].clone() for k, i in enumerate(rows)}
    return [states[i] for i in range(len(texts))]


def top_layers(base: str, count: int, classes: int) -> nn.Module:
    """Return the classifier's last encoder layers, pooler and new head: called with the states below them."""
    model = start_hugging_face(fetch(base), AutoModelForSequenceClassification, num_labels=classes)
    model.bert.embeddings = Given()  # type: ignore[union-attr]
    model.bert.encoder.layer = model.bert.encoder.layer[-count:]  # type: ignore[union-attr, index]
    return model


class Given(nn.Module):
    """Stands where the embeddings were: the states come from outside."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def fetch(base: str) -> Path:
    """Return the folder of a pretrained model: of this repository, or of a package."""
    return Location.parse(base if ":" in base else str(ROOT / base)).fetch(ROOT / "runs" / "cache")


def mlp(sizes: list[int]) -> nn.Sequential:
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def logits(model: nn.Module, batch: Batch) -> Tensor:
    if "mask" in batch.tensors:
        return model(inputs_embeds=batch["x"], attention_mask=batch["mask"]).logits
    return model(batch["x"])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(logits(model, batch), batch["target"], reduction="none")


def logits_of(model: nn.Module, part: Part) -> Tensor:
    """Return [n, classes] of a whole part, in its order."""
    found = []
    with torch.no_grad():
        for batch in part.batches():
            found.append((batch.ids, logits(model, batch)))
    rows = torch.cat([ids for ids, _ in found])
    return torch.cat([out for _, out in found])[rows.argsort()]


def mean_loss(model: nn.Module, part: Part) -> float:
    return float(F.cross_entropy(logits_of(model, part), part.labels))


def accuracy(model: nn.Module, part: Part) -> float:
    return float((logits_of(model, part).argmax(1) == part.labels).double().mean())
