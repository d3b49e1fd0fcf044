"""What the address bar says: which view, run, scores, filters, page number and k. A copied address shows the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

KEPT = ("run", "scores", "k")  # what goes along from one view to another


@dataclass(frozen=True)
class State:
    """One address of the page: `view?run=…&scores=…`. Values are text, as they stand in the address."""

    view: str
    values: Mapping[str, str]

    def get(self, name: str) -> str | None:
        """Return a value, None where it is not there or empty."""
        return self.values.get(name) or None

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """Return a whole number between low and high: what the address says, brought into that range, else the default."""
        text = self.values.get(name, "")
        return min(max(int(text), low), high) if text.isdecimal() and len(text) < 19 else min(max(default, low), high)

    def number(self, name: str) -> float | None:
        """Return a number, None where there is none."""
        try:
            value = float(self.values.get(name, ""))
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    def change(self, **values: object) -> str:
        """Return the address of this view with some values changed; None takes one away."""
        return address(self.view, {**self.values, **values})

    def link(self, view: str, **values: object) -> str:
        """Return the address of another view of the same run and scores."""
        return address(view, {**{name: self.values.get(name) for name in KEPT}, **values})


def address(view: str, values: Mapping[str, object]) -> str:
    """Return an address relative to the page's folder, so that it holds wherever the page is mounted."""
    return f"{view}?{urlencode({name: value for name, value in values.items() if value not in (None, '')})}"
