"""Turn-over dropout through the Hugging Face Trainer: a collator that carries ids, and the record beside each checkpoint.

    Trainer(model, args, train_dataset=rows, data_collator=carrying_ids(collator), callbacks=[RecordMasks(turnover)])

with `remove_unused_columns=False`, so that the rows keep their field `id`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from engine.turnover import IDS, TurnOver


def carrying_ids(collate: Callable[[list], Mapping[str, Any]], field: str = "id") -> Callable[[list], dict[str, Any]]:
    """Return a collator that takes each row's id out of it and hands it to the model as the input `example_ids`.

    Raises ValueError for rows without one: the Trainer dropped the column, or they never had it.
    """

    def carry(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if any(field not in row for row in rows):
            raise ValueError(
                f"rows have no field {field!r}, only {', '.join(rows[0])}: masks belong to examples. Give every row its "
                f"number, and set TrainingArguments(remove_unused_columns=False)."
            )
        ids = torch.tensor([int(row[field]) for row in rows])
        others = [{name: value for name, value in row.items() if name != field} for row in rows]
        return {**collate(others), IDS: ids}

    return carry


class RecordMasks(TrainerCallback):
    """Writes the masks' record into every checkpoint that the Trainer saves."""

    def __init__(self, turnover: TurnOver) -> None:
        self.turnover = turnover

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.turnover.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
