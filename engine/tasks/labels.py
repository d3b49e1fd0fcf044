"""Class labels: from what a corpus holds to the model's index, and back."""

import json
from pathlib import Path
from typing import Any


class Labels:
    """The classes of a model, read from its config.json or given by name."""

    def __init__(self, folder: Path | None, names: list[str] | None, count: int | None = None) -> None:
        config: dict[str, Any] = {}
        if folder and (folder / "config.json").exists():
            config = json.loads((folder / "config.json").read_text())
        own = config.get("id2label")
        default = {str(i): f"LABEL_{i}" for i in range(len(own or {}))}
        self.names = names or ([own[str(i)] for i in range(len(own))] if own and own != default else None)
        self.count = len(self.names) if self.names else (count or (len(own) if own else None))

    def index(self, label: Any, field: str) -> int:
        """Return the class index of a label. Raises ValueError naming the value and what is allowed."""
        if label is None:
            raise ValueError(f"field {field!r} is missing: a label is needed")
        if self.names and str(label) in self.names:
            return self.names.index(str(label))
        try:
            index = int(label)
            whole = float(label) == index
        except (TypeError, ValueError, OverflowError):
            index, whole = -1, False
        if not whole or index < 0 or (self.count is not None and index >= self.count):
            raise ValueError(
                f"field {field!r} is {label!r}, allowed: {self._allowed()}. Set task.settings.labels for names."
            )
        return index

    def name(self, index: int) -> Any:
        return self.names[index] if self.names else index

    def _allowed(self) -> str:
        numbers = f"0 to {self.count - 1}" if self.count else "a whole number from 0"
        return f"{numbers}, or one of {', '.join(self.names[:10])}" if self.names else numbers
