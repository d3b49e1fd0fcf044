"""Tiny models, a tiny tokenizer and the mutation check. No network; Ray only for tests that ask for it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.batches import Batch

WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "was",
    "is",
    "good",
    "bad",
    "dull",
    "fine",
    "never",
    "always",
    "great",
    "poor",
    "and",
    "not",
    "very",
    "so",
    "this",
    "that",
]


class ToyMlp(nn.Module):
    """Linear, in-place ReLU, LayerNorm and RMSNorm, and one Linear that is called twice."""

    def __init__(self, inputs: int = 5, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(width)
        self.shared = nn.Linear(width, width)
        self.rms = nn.RMSNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.act(self.first(x)))
        h = self.act(self.shared(h))
        h = self.rms(self.act(self.shared(h)))
        return self.head(h)


def toy_mlp() -> nn.Module:
    """Return an MLP for tasks that build a torch module by dotted path."""
    return ToyMlp()


def mlp_loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return one cross-entropy per text of a sequence classifier."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["y"], reduction="none")


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed next-token cross-entropy of every sequence, padding left out."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Return the model with every weight drawn anew: no bias stays zero, no scale one, no two layers alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            weight.copy_(centre + scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def tiny_bert(**changes: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    settings = {
        "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0,
    } | changes  # fmt: skip
    return randomise(BertForSequenceClassification(BertConfig(**settings)))


def tiny_gpt2(vocabulary: int = 32, width: int = 8, **changes: Any) -> nn.Module:
    """Return a GPT-2 with its head tied to the embedding and square Conv1D projections."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": vocabulary, "n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 16, "n_inner": 12,
        "bos_token_id": 1, "eos_token_id": 1,
    } | changes  # fmt: skip
    return randomise(GPT2LMHeadModel(GPT2Config(**settings)))


def mlp_batch(size: int = 6, seed: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (size,), generator=generator)
    return Batch(torch.arange(size) + 100, {"x": x, "y": y})


def token_batch(lengths: tuple[int, ...] = (3, 7, 2, 5), vocabulary: int = 32, seed: int = 2) -> Batch:
    """Return padded token sequences of these lengths, with a class beside each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, vocabulary, (length,), generator=generator)
        mask[row, :length] = 1
    y = torch.randint(0, 3, (len(lengths),), generator=generator)
    return Batch(torch.arange(len(lengths)) + 2**40, {"input_ids": ids, "attention_mask": mask, "y": y})


class EveryLayer(nn.Module):
    """Tables with padding_idx, square Conv1D, RMSNorm with eps, LayerNorm without bias, 4-D inputs, a tied square head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(width, width, padding_idx=0)
        self.places = nn.Embedding(8, width)
        self.conv = Conv1D(width, width)
        self.wide = Conv1D(width + 3, width)
        self.back = nn.Linear(width + 3, width, bias=False)
        self.norm = nn.LayerNorm(width, bias=False)
        self.rms = nn.RMSNorm(width, eps=1e-3)
        self.plain = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, width)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids) + self.places(torch.arange(ids.shape[1]).unsqueeze(0))  # positions of shape [1, T]
        h = h + torch.tanh(self.conv(h))
        h = self.back(torch.relu_(self.wide(self.norm(h))))
        h = self.rms(h.unsqueeze(2).expand(-1, -1, 2, -1)).sum(2)  # 4-D inside
        return self.head(input=self.plain(h))


def every_loss(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    logits = model(ids)[:, :-1]
    labels = ids[:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


def every_layer() -> nn.Module:
    return randomise(EveryLayer())


def every_batch() -> Batch:
    batch = token_batch((4, 7, 2, 8), vocabulary=6)
    batch["input_ids"][1, 2] = 0  # the padding index inside a text, where the head still sees it as a label
    return batch


class ToyCnn(nn.Module):
    """Convolutions with every kind of padding, stride, dilation and groups, one called twice, and both channel norms."""

    def __init__(self, channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding="same", padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 2, dilation=2, padding="same", groups=6, padding_mode="circular")
        self.group_norm = nn.GroupNorm(2, 6)
        self.line = nn.Conv1d(6, 5, 2, stride=2)
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.relu(self.norm(self.first(x)), inplace=True)
        h = torch.tanh(self.shared(h))
        h = torch.tanh(self.shared(h[:, :, ::2]))
        h = self.group_norm(self.depthwise(torch.tanh(self.grouped(h))))
        return self.head(torch.tanh(self.line(h.flatten(2))).mean(2))


def toy_cnn() -> nn.Module:
    """Return a CNN of ten classes for tasks that build a torch module by dotted path."""
    return ToyCnn(classes=10)


def random_cnn() -> nn.Module:
    model = randomise(ToyCnn())
    model.norm.running_mean.copy_(torch.linspace(-0.2, 0.3, 4))
    model.norm.running_var.copy_(torch.linspace(0.5, 2.0, 4))
    return model


def image_batch(size: int = 5) -> Batch:
    batch = mlp_batch(size)
    images = torch.randn(size, 1, 8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch(batch.ids, {"x": images, "y": batch["y"]})


CASES: dict[str, tuple[Callable[[], nn.Module], Callable, Callable[[], Batch]]] = {
    "mlp": (lambda: randomise(ToyMlp()), mlp_loss, mlp_batch),
    "bert": (tiny_bert, text_loss, token_batch),
    "gpt2": (tiny_gpt2, token_loss, token_batch),
    "every-layer": (every_layer, every_loss, every_batch),
    "cnn": (random_cnn, mlp_loss, image_batch),
    "gpt2-square-tied": (lambda: tiny_gpt2(8, 8), token_loss, lambda: token_batch(vocabulary=8)),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable, Batch]:
    """A float64 model, its loss and a batch; padded where it is text."""
    model, loss, batch = CASES[request.param]
    return model().double(), loss, batch()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a word-level tokenizer: [PAD] 0, [EOS] 1, [UNK] 2, [CLS] 3, [SEP] 4, then WORDS."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    folder = tmp_path_factory.mktemp("tokenizer")
    for kind, special in (("plain", False), ("wrapped", True)):
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        if special:
            tokenizer.post_processor = TemplateProcessing(
                single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
            )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
        ).save_pretrained(folder / kind)
    return folder


Caught = Callable[[Callable[[], None], Any, str, Any], None]


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Caught:
    """Assert that a comparison with its oracle holds, and that it fails once `owner.name` is replaced by a mutant."""

    def check(compare: Callable[[], None], owner: Any, name: str, mutant: Any) -> None:
        compare()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, mutant)
            with pytest.raises(AssertionError):
                compare()

    return check


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run every test on one torch thread, as a CPU worker does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all cluster tests: four CPUs by name, whatever the machine has."""
    import ray

    from actors import cluster

    cluster.connect("local", num_cpus=4)
    yield
    ray.shutdown()
