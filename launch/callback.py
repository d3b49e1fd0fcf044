"""Recording a Hugging Face training while it runs, so that its checkpoints can be scored as they are.

    trainer = Trainer(…, callbacks=[InfluenceCallback()])

Every checkpoint folder gets an influence.json: the learning rate of the step that led to it, taken from the optimizer,
where the Trainer's own log has one only at every logging step. The file lies inside the folder, so it goes where that
goes: a checkpoint that `save_total_limit` deletes takes its record along, and training that resumes adds to what is there.
It names the Trainer's own files that it was written beside: after a later training into the same folder it counts no more.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from storage.checkpoints import RECORD, witnesses
from storage.locations import Location


class InfluenceCallback(TrainerCallback):
    """Writes the exact learning rate into every checkpoint that the Trainer leaves. Only the process that saves writes."""

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] | None = None  # of the last step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ValueError in a hyperparameter search, whose checkpoints are many trainings'."""
        if state.is_hyper_param_search:
            raise ValueError("InfluenceCallback records one training: use it for the final one, not for the search")

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remember the rates of the step just made; the scheduler moves on after this event."""
        self._groups = [
            {"learning_rate": float(group["lr"]), "parameters": sum(weight.numel() for weight in group["params"])}
            for group in optimizer.param_groups
            if group["params"]
        ]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record of the checkpoint just saved; warn if its parameters were trained at several rates."""
        if not args.should_save or self._groups is None:
            return
        rates = sorted({group["learning_rate"] for group in self._groups})
        if len(rates) > 1:
            warnings.warn(
                f"this training has several learning rates ({', '.join(f'{rate:g}' for rate in rates)}). Scores weigh a "
                f"checkpoint by one: set checkpoints.learning_rate when scoring.",
                stacklevel=2,
            )
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        record = {
            "step": state.global_step, "learning_rate": rates[0] if len(rates) == 1 else None, "groups": self._groups,
            "beside": witnesses(Location.parse(str(folder.resolve()))),
        }  # fmt: skip
        whole = folder / f"{RECORD}.part"
        whole.write_text(json.dumps(record, indent=1))
        os.replace(whole, folder / RECORD)
