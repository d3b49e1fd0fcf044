import numpy as np
import pytest
import torch

from engine.tasks.text import cut_tokens, load_tokenizer, model_inputs, targets, text_batch, text_of


def test_tokenizers_are_read_from_a_folder_only(tokenizer_folder, tmp_path):
    assert load_tokenizer(tokenizer_folder / "plain").pad_token_id == 0
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_long_texts_are_cut_with_their_special_tokens_and_say_so(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder / "wrapped")
    kept, cut = cut_tokens(tokenizer, "the film was good", 6)
    assert (len(kept), cut) == (6, False)
    kept, cut = cut_tokens(tokenizer, "the film was good", 5)
    assert (kept[0], kept[-1], len(kept), cut) == (3, 4, 5, True)
    assert kept.dtype == np.int32


def test_text_batches_are_padded_and_masked():
    batch = text_batch([{"id": 2**40, "input_ids": [5, 6, 7]}, {"id": 3, "input_ids": np.array([8])}], 9, {})
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.ids.tolist() == [2**40, 3]
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("value", [None, 3, b"x"])
def test_what_is_no_text_is_refused_naming_the_fields(value):
    with pytest.raises(ValueError, match=r"field 'text' is .* The record has label, text"):
        text_of({"text": value, "label": 1}, "text")


def test_targets_have_their_dtype():
    assert targets([{"target": 1}, {"target": 0}]).dtype == torch.int64
    assert targets([{"target": 1.5}], torch.float32).tolist() == [1.5]
