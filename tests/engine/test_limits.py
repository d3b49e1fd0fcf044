import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from engine.limits import InputLimits, read_limits


def test_limits_come_from_the_models_config(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == InputLimits(None, None)
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 16, "vocab_size": 9}))
    assert read_limits(tmp_path) == InputLimits(16, 9)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8}))
    assert read_limits(tmp_path) == InputLimits(8, None)


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "bert"])
def test_as_many_tokens_as_said_are_read_and_not_one_more(tmp_path: Path, kind: str) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, intermediate_size=8, max_position_embeddings=12, pad_token_id=1)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    limit = read_limits(tmp_path).positions
    assert limit == (12 if kind == "bert" else 10)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "the example has no tokens"),
        ([1] * 5, "the example has 5 tokens, the model 4 positions: set task.settings.max_tokens=4"),
        ([1, 9], "token ids 1 to 9, the model knows 0 to 8: set task.settings.tokenizer"),
        ([-1, 2], "token ids -1 to 2, the model knows 0 to 8"),
    ],
)
def test_what_the_model_cannot_read_is_refused(tokens: list[int], message: str) -> None:
    rows = [{"input_ids": np.array(tokens, dtype=np.int32)}]
    with pytest.raises(ValueError, match=message):
        InputLimits(4, 9).check(rows)


def test_what_it_can_read_or_nothing_is_known_of_passes() -> None:
    rows = [{"input_ids": np.array([0, 8, 3, 1])}, {"target": 1}]
    assert InputLimits(4, 9).check(rows) is rows
    assert InputLimits(None, None).check([{"input_ids": [10**6] * 99}])
