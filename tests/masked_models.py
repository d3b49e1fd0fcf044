"""A tokenizer with a mask token, and a tiny BERT with its decoder tied to the embedding."""

from pathlib import Path
from typing import Any

from torch import nn

from tests.conftest import WORDS, randomise

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MASK = 4


def write_mask_tokenizer(folder: Path) -> Path:
    """Save a word-level tokenizer that wraps texts in [CLS] and [SEP]: the special tokens 0 to 4, then WORDS."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(names, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_masked_bert(**changes: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    settings = {
        "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "max_position_embeddings": 16, "pad_token_id": 0,
    } | changes  # fmt: skip
    return randomise(BertForMaskedLM(BertConfig(**settings)))
