"""New queries as the corpus would hold them: their ids, and what their model can read."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from launch.online import Answer
from launch.run import Run
from tests.conftest import tiny_gpt2
from tests.end_to_end.conftest import run_job, write_texts
from tests.launch.test_tokens import language_run


def test_what_a_user_calls_a_text_does_not_change_its_answer(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A masked language model hides tokens by the example's id: a new text has one and the same."""
    run = language_run(tmp_path, tokenizer_folder, "masked-lm", "tracin")
    setting, text = run.setting(), "the film was good"

    def answer(record: dict[str, Any]) -> Answer:
        return run.ask([record], None, 12, setting)[0]

    plain = answer({"text": text})
    for given in ({"id": 3170}, {"id": "abc"}, {"id": True}, {"id": 2**63}, {"length": "3 min"}):
        found = answer({"text": text} | given)
        assert (found.proponents, found.opponents) == (plain.proponents, plain.opponents), given
    row = run.queries(run.index()).row(1)
    stored, again = run.top(1, k=12).to_pylist(), answer(row)
    asked = {one["id"]: one["score"] for one in again.proponents + again.opponents}
    for one in stored:  # of its own row, with the tokens that it hid in the job
        if one["id"] in asked:
            assert asked[one["id"]] == pytest.approx(one["score"], rel=1e-4)
    assert {one["id"] for one in stored} & asked.keys()
    renamed = answer({"text": row["text"]})
    assert [one["score"] for one in renamed.proponents] != [one["score"] for one in again.proponents]


def adapter_run(folder: Path, tokenizer_folder: Path) -> Run:
    base = tiny_gpt2(bos_token_id=None, eos_token_id=1)
    base.save_pretrained(folder / "base")
    for file in (tokenizer_folder / "plain").iterdir():
        (folder / "base" / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        type(base).from_pretrained(folder / "base"),
        peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, bias="all"),
    )
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape)
    adapted.save_pretrained(folder / "adapter")
    write_texts(folder / "train.jsonl", 12)
    write_texts(folder / "asked.jsonl", 2, first=900)
    return run_job({
        "run": str(folder / "run"), "task": {"name": "causal-lm", "settings": {"max_tokens": 400}},
        "checkpoints": [{"path": str(folder / "adapter"), "learning_rate": 0.1}],
        "corpus": str(folder / "train.jsonl"), "queries": str(folder / "asked.jsonl"),
        "gradients": {"coverage": 2}, "cluster": {"backend": "in-process"}, "output": {"top_k": 50},
    })  # fmt: skip


def test_a_query_to_an_adapter_is_held_to_the_limits_of_its_base(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = adapter_run(tmp_path, tokenizer_folder)
    positions = tiny_gpt2().config.n_positions
    with pytest.raises(ValueError, match=f"the example has {positions + 21} tokens, the model {positions} positions"):
        run.ask([{"text": "good " * (positions + 20)}])
    with pytest.raises(ValueError, match="token ids 3 to 1000000, the model knows 0 to"):
        run.ask([{"input_ids": [3, 4, 5, 10**6]}])
    assert run.ask([{"text": "a good film"}])[0].proponents
    assert any(name.endswith("ln_f.bias") for name in run.setting().gradients.parameters)  # trained with it: bias="all"
