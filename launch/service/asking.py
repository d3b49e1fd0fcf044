"""New text for a service: the models of all checkpoints stay loaded, one question is computed at a time."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.context import WorkerContext
from launch.online import predicted_label
from launch.run import Run
from storage.locations import Location


class Answerer:
    """Answers new questions as one label's stored ones were answered."""

    def __init__(self, run: Location, scores: str) -> None:
        self.run = Run(run)
        setting = self.run.setting(scores)
        self.setting = replace(setting, context=WorkerContext(run.uri, hold_all=True))
        self.task = self.setting.context.task(self.setting.model)
        self._lock = threading.Lock()

    def ask(
        self, records: Sequence[str | dict[str, Any]], labels: Sequence[Any] | None, k: int
    ) -> list[dict[str, Any]]:
        """Return prediction, label, proponents and opponents of each, best first. ValueError for what the task refuses."""
        with self._lock:
            rows = [self._record(record) for record in records]
            given = list(labels) if labels else [None] * len(rows)
            if len(given) != len(rows):
                raise ValueError(f"{len(given)} labels for {len(rows)} texts are not allowed: one each, or none")
            predicted = [self._predicted(row) for row in rows]
            field = getattr(self.task, "label_field", None)
            if field is None and any(label is not None for label in given):
                raise ValueError(f"task {self.setting.model.task} takes no label: leave it out")
            asked = [p if label is None else label for p, label in zip(predicted, given, strict=True)]
            answers = self.run.ask(rows, asked if field else None, k, self.setting)
        return [
            {
                "prediction": prediction, "label": answer.query.get(field) if field else None,
                "proponents": answer.proponents, "opponents": answer.opponents,
            }
            for prediction, answer in zip(predicted, answers, strict=True)
        ]  # fmt: skip

    def _predicted(self, row: dict[str, Any]) -> Any:
        if not hasattr(self.task, "predict"):
            return None
        return predicted_label(self.setting, row)

    def _record(self, record: str | dict[str, Any]) -> dict[str, Any]:
        """Return a record as the corpus holds them; token ids become the text that they stand for."""
        field = getattr(self.task, "text_field", None)
        if isinstance(record, str):
            if field is None:
                raise ValueError(f"task {self.setting.model.task} reads no text: send a record with its fields")
            return {field: record}
        if "token_ids" not in record:
            return record
        rest = {name: value for name, value in record.items() if name != "token_ids"}
        return rest | {str(field): self._text_of([int(token) for token in record["token_ids"]])}

    def _text_of(self, ids: list[int]) -> str:
        """Return the text of which the tokenizer makes these tokens, special ones aside. ValueError if there is none."""
        tokenizer = getattr(self.task, "tokenizer", None)
        if tokenizer is None or getattr(self.task, "text_field", None) is None:
            raise ValueError(f"task {self.setting.model.task} reads no tokens: send a record with its fields")
        if not all(0 <= token < len(tokenizer) for token in ids):
            raise ValueError(f"token_ids must lie in 0 to {len(tokenizer) - 1}")
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        plain = [token for token in ids if token not in special]
        text = tokenizer.decode(plain)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != plain:
            raise ValueError("token_ids are not what the tokenizer makes of any text: send the text")
        return text
