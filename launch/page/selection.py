"""Which training examples a cleansing would drop: the top n % by a number, or all above a threshold; and the list to keep."""

import csv
import io
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.page.state import State
from launch.service.catalog import RunView

STEP = 10_000  # rows read at a time
COLUMNS = ("id", "source_id", "label", "self_influence", "total", "loss")
FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.]+$)")
# order of the catalog -> what it means to drop from its beginning
ORDERS = {
    "self_influence": "self-influence, largest first",
    "-total": "total influence, most harmful first",
    "loss": "loss, largest first",
}


@dataclass(frozen=True)
class Selection:
    """The first `count` examples in an order: those that would be dropped."""

    order: str
    count: int
    examples: int

    @property
    def column(self) -> str:
        """Return the number that the order goes by."""
        return self.order.removeprefix("-")

    def beyond(self, value: float, threshold: float) -> bool:
        """Tell whether a value lies at the threshold or on the side that is dropped."""
        return value <= threshold if self.order.startswith("-") else value >= threshold


def select(run: RunView, label: str, state: State) -> Selection:
    """Return what the address selects: `threshold` if it stands there, else `percent` (default 5) of all examples."""
    order = state.values.get("order", "")
    order = order if order in ORDERS else "self_influence"
    total = run.examples(label, order=order, offset=0, limit=1).total
    threshold = state.number("threshold")
    if threshold is not None:
        whole = Selection(order, total, total)
        return replace(whole, count=count_beyond(run, label, whole, threshold))
    percent = state.number("percent")
    share = min(max(5.0 if percent is None else percent, 0.0), 100.0) / 100
    return Selection(order, round(share * total), total)


def count_beyond(run: RunView, label: str, whole: Selection, threshold: float) -> int:
    """Return how many examples lie at or beyond a threshold, asking for O(log N) single rows of the ordered table."""

    def stays(place: int) -> bool:
        value = run.examples(label, order=whole.order, offset=place, limit=1).rows[0][whole.column]
        return value is None or not whole.beyond(value, threshold)

    return bisect_left(range(whole.count), True, key=stays)


def dropped_ids(run: RunView, label: str, selection: Selection) -> set[int]:
    """Return the ids that the selection drops."""
    rows: list[dict[str, Any]] = []
    for offset in range(0, selection.count, STEP):
        limit = min(STEP, selection.count - offset)
        rows += run.examples(label, order=selection.order, offset=offset, limit=limit).rows
    return {int(row["id"]) for row in rows}


def export(run: RunView, label: str, selection: Selection, which: str, form: str) -> Iterator[str]:
    """Yield a file of the examples kept or dropped, in id order; `form` is csv or jsonl. Memory: the dropped ids."""
    dropped = dropped_ids(run, label, selection)
    if form == "csv":
        yield ",".join(COLUMNS) + "\r\n"
    for offset in range(0, selection.examples, STEP):
        rows = run.examples(label, order="id", offset=offset, limit=STEP).rows
        yield "".join(written([row for row in rows if (int(row["id"]) in dropped) == (which == "dropped")], form))


def written(rows: Sequence[dict[str, Any]], form: str) -> Iterator[str]:
    """Yield rows as lines. In csv a text that a spreadsheet would compute gets an apostrophe."""
    for row in rows:
        values = {name: row.get(name) for name in COLUMNS}
        if form == "jsonl":
            yield json.dumps(values, ensure_ascii=False) + "\n"
        else:
            line = io.StringIO()
            csv.writer(line).writerow(map(plain_cell, values.values()))
            yield line.getvalue()


def plain_cell(value: Any) -> Any:
    """Return a csv cell that no spreadsheet takes for a formula; numbers, as texts too, stay as they are."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value
