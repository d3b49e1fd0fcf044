"""The Hugging Face Trainer trains under the same masks as a plain loop, saves their record, and goes on after a stop."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.bottleneck import PLACE, TRAINED, add_adapters
from engine.models import read_state
from engine.training import freeze
from engine.turnover import TurnOver, restore
from engine.turnover_trainer import RecordMasks, carrying_ids
from tests.conftest import tiny_bert, token_batch

BATCH = token_batch((6,) * 8)
ROWS = [
    {"id": int(i), "input_ids": tokens, "labels": y}
    for i, tokens, y in zip(BATCH.ids, BATCH["input_ids"], BATCH["y"], strict=True)
]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def adapted() -> tuple[nn.Module, TurnOver]:
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    add_adapters(model, 4)
    freeze(model, (TRAINED, "classifier.*"))
    return model, TurnOver(model, after=[PLACE], before=["classifier"])


def trained(folder: Path, steps: int, resume: bool = False) -> tuple[nn.Module, TurnOver]:
    from transformers import Trainer, TrainingArguments

    model, turnover = adapted()
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, learning_rate=1e-2, report_to=[],
        remove_unused_columns=False, disable_tqdm=True, logging_strategy="no", use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=ROWS, data_collator=carrying_ids(collate), callbacks=[RecordMasks(turnover)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pinned memory without a GPU
        trainer.train(resume_from_checkpoint=resume or None)
    return model, turnover


def test_the_trainer_trains_under_each_example_s_mask_and_resumes(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    plain_use = TurnOver.use

    def use(self: TurnOver, ids: torch.Tensor, *rest: Any) -> None:
        seen.append(ids.tolist())
        plain_use(self, ids, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TurnOver, "use", use)
        model, turnover = trained(tmp_path / "whole", 4)
    assert sorted(i for ids in seen for i in ids) == [row["id"] for row in ROWS]

    by_hand, masks = adapted()
    optimizer = torch.optim.AdamW([w for w in by_hand.parameters() if w.requires_grad], 1e-2, weight_decay=0.0)
    position = {row["id"]: i for i, row in enumerate(ROWS)}
    by_hand.train()
    for ids in seen:
        rows = collate([{k: v for k, v in ROWS[position[i]].items() if k != "id"} for i in ids])
        masks.use(torch.tensor(ids))
        optimizer.zero_grad()
        by_hand(**rows).loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name

    trained(tmp_path / "parts", 2)
    again, _ = trained(tmp_path / "parts", 4, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))

    folder = tmp_path / "whole" / "checkpoint-4"
    found, _ = adapted()
    found.load_state_dict(read_state(folder))
    assert restore(found, folder).record() == turnover.record()


def test_evaluation_through_the_trainer_s_inputs_is_of_the_full_network() -> None:
    model, turnover = adapted()
    batch = carrying_ids(collate)(ROWS)
    rows = {name: value for name, value in batch.items() if name != "example_ids"}
    turnover.use(BATCH.ids)
    under = model(**rows).logits
    turnover.off()
    full = model(**rows).logits
    assert not torch.allclose(under, full)
    assert torch.equal(model.eval()(**batch).logits, full)
    assert torch.equal(model.train()(**batch).logits, under)


def test_rows_without_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        carrying_ids(collate)([{"input_ids": BATCH["input_ids"][0]}])
