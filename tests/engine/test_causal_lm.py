from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.tasks.causal_lm import CausalLM
from tests import oracles
from tests.conftest import tiny_gpt2


class Bigram(nn.Module):
    """The next token depends on the last one alone, so cutting the context changes nothing."""

    def __init__(self, vocabulary: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def task_of(folder, **settings) -> CausalLM:
    return CausalLM(str(folder / "plain"), **settings)


def document_loss(model: Bigram, tokens: list[int], counted: list[int]) -> float:
    log = model.table.detach().log_softmax(-1)
    return -float(sum(log[tokens[i - 1], tokens[i]] for i in range(1, len(tokens)) if counted[i]))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 10, 16])
@pytest.mark.parametrize("max_tokens", [2, 3, 4, 7, 100])
def test_chunk_losses_add_up_to_the_document(tokenizer_folder, length, max_tokens):
    task, model = task_of(tokenizer_folder, max_tokens=max_tokens), Bigram()
    tokens = np.random.default_rng(length).integers(5, 25, length).tolist()
    rows = task.encode({"input_ids": tokens})
    assert sum(int(row["counted"].sum()) for row in rows) == length - 1  # every token but the first, once
    assert all(2 <= len(row["input_ids"]) <= max_tokens for row in rows)
    total = float(task.loss(model, task.collate(rows)).detach().sum())
    assert total == pytest.approx(document_loss(model, tokens, [1] * length), rel=1e-12)


@pytest.mark.parametrize("max_tokens", [2, 3, 100])
def test_masked_labels_are_left_out_in_every_chunk(tokenizer_folder, max_tokens):
    task, model = task_of(tokenizer_folder, max_tokens=max_tokens), Bigram()
    tokens, labels = [5, 6, 7, 8, 9, 10, 11], [5, -100, -100, -100, 9, -100, 11]
    rows = task.encode({"input_ids": tokens, "labels": labels})
    total = float(task.loss(model, task.collate(rows)).detach().sum())
    assert total == pytest.approx(document_loss(model, tokens, [x != -100 for x in labels]), rel=1e-12)
    assert all(row["counted"].any() for row in rows)


def test_prompts_are_read_but_not_predicted(tokenizer_folder):
    task, model = task_of(tokenizer_folder, prompt_field="prompt"), Bigram()
    row = task.encode({"prompt": "the film", "text": "was good"})[0]
    tokens = row["input_ids"].tolist()
    assert len(tokens) == 5
    assert tokens[-1] == 1  # the end is predicted too
    assert row["counted"].tolist() == [0, 0, 1, 1, 1]
    found = float(task.loss(model, task.collate([row])).detach())
    assert found == pytest.approx(document_loss(model, tokens, [0, 0, 1, 1, 1]), rel=1e-12)


def test_an_empty_prompt_changes_nothing(tokenizer_folder):
    with_prompt = task_of(tokenizer_folder, prompt_field="prompt").encode({"prompt": "", "text": "was good"})[0]
    without = task_of(tokenizer_folder).encode({"text": "was good"})[0]
    assert with_prompt["input_ids"].tolist() == without["input_ids"].tolist()
    assert with_prompt["counted"].tolist() == without["counted"].tolist()


def test_the_end_is_left_out_on_request(tokenizer_folder):
    assert task_of(tokenizer_folder, append_end=False).encode({"text": "was good"})[0]["input_ids"].tolist()[-1] != 1


def test_losses_do_not_depend_on_padding_and_equal_the_transformers_own(tokenizer_folder):
    task, model = task_of(tokenizer_folder), tiny_gpt2().double()
    rows = [task.encode({"text": text})[0] for text in ("the film was good", "bad", "a very dull and great plot")]
    with torch.inference_mode():
        together = task.loss(model, task.collate(rows))
        for row, found in zip(rows, together, strict=True):
            ids = torch.tensor(row["input_ids"].tolist())[None]
            exact = model(ids, labels=ids).loss * (ids.shape[1] - 1)
            assert torch.allclose(found, exact.double(), rtol=1e-6)  # theirs is taken in float32


def test_mean_divides_by_the_counted_tokens_only(tokenizer_folder):
    record = {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]}
    both = [
        float(t.loss(Bigram(), t.collate(t.encode(record))).detach())
        for t in (task_of(tokenizer_folder), task_of(tokenizer_folder, reduction="mean"))
    ]
    assert both[0] == pytest.approx(2 * both[1], rel=1e-12)


def test_a_doubled_text_of_the_same_steps_has_twice_the_summed_loss(tokenizer_folder):
    task, model = task_of(tokenizer_folder), Bigram()
    once, twice = ([5, 6] * n + [5] for n in (2, 4))
    losses = [float(task.loss(model, task.collate(task.encode({"input_ids": t}))).detach()) for t in (once, twice)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-12)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5]}, "no loss-bearing token"),
        ({"input_ids": []}, "no loss-bearing token"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "no loss-bearing token"),
        ({"input_ids": [5, 6], "labels": [5]}, "'labels' has 1 entries for 2"),
        ({"text": ""}, "no loss-bearing token"),
        ({"words": "x"}, "field 'text' is None"),
    ],
)
def test_records_without_anything_to_predict_are_refused(tokenizer_folder, record, message):
    with pytest.raises(ValueError, match=message):
        task_of(tokenizer_folder).encode(record)


@pytest.mark.parametrize("settings", [{"max_tokens": 1}, {"reduction": "total"}])
def test_settings_out_of_range_are_refused(tokenizer_folder, settings):
    with pytest.raises(ValueError, match=f"task.settings.{next(iter(settings))}="):
        task_of(tokenizer_folder, **settings)


def test_mean_for_sum_and_uncounted_chunk_borders_are_caught(tokenizer_folder, caught):
    task, model = task_of(tokenizer_folder, max_tokens=3), Bigram()
    tokens = list(range(5, 15))

    def compare() -> None:
        total = task.loss(model, task.collate(task.encode({"input_ids": tokens}))).detach().sum()
        truth = torch.tensor(document_loss(model, tokens, [1] * len(tokens)), dtype=torch.float64)
        assert oracles.relative_error(total, truth) <= 1e-10

    encode = CausalLM.encode
    caught(compare, task, "reduction", "mean")
    caught(
        compare,
        CausalLM,
        "encode",
        lambda self, record: [
            row
            for begin in range(0, len(tokens), 3)
            for row in (encode(self, {"input_ids": tokens[begin : begin + 3]}) if begin + 1 < len(tokens) else [])
        ],
    )


def test_padding_of_a_tokenised_record_is_left_out(tokenizer_folder) -> None:
    task = CausalLM(str(tokenizer_folder / "plain"))
    (row,) = task.encode({"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]})
    assert row["input_ids"].tolist() == [5, 6, 7]
    assert row["counted"].tolist() == [0, 1, 1]


def test_labels_that_are_not_the_tokens_are_refused(tokenizer_folder) -> None:
    task = CausalLM(str(tokenizer_folder / "plain"))
    with pytest.raises(ValueError, match="field 'labels' is neither -100 nor the token"):
        task.encode({"input_ids": [5, 6, 7], "labels": [-100, 6, 8]})
