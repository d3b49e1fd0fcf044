"""Compare two scorings of the same queries: do they name the same examples, in the same order?

    python launch/compare.py RUN_A RUN_B [--scores-a L --scores-b L] [--top 10] [--json]

Two labels of one run: give the run twice.
"""

import json
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from launch.command import find_modules_here, run_command
from launch.messages import plain_errors
from launch.run import Run
from storage.index import SIDES, ScoreIndex

FEWEST = 3  # examples in common from which a rank correlation is taken


def compare(a: ScoreIndex, b: ScoreIndex, top: int) -> dict[str, Any]:
    """Return overlap and rank correlation of two indices, means over the queries.

    `overlap`: of the `top` strongest on a side, the share that both name (of as many as the shorter list has).
    `correlation`: Spearman's of the scores of those both keep on that side. `self_influence` and `total`: Spearman's
    over all examples that both have. None where nothing can be compared. ValueError for different queries or corpora, and
    for logits beside losses.
    """
    units = [index.meta["score_unit"] for index in (a, b)]
    if units[0] != units[1] and "logit" in units:
        raise ValueError(
            f"scores {a.label} are in units of {units[0]}, scores {b.label} of {units[1]}: what raises a logit and what "
            f"lowers a loss are not compared"
        )
    kept = min(a.meta["top_k"], b.meta["top_k"])
    if not 1 <= top <= kept:
        raise ValueError(f"--top {top} is not allowed: 1 to {kept}, which both keep")
    first, second = (pa.Table.from_batches(list(index.table("by_query"))) for index in (a, b))
    _same(first, second, "query", "query_source_id")
    found: dict[str, Any] = {"a": a.label, "b": b.label, "top": top}
    for side in SIDES:
        lists = [_lists(table, side) for table in (first, second)]
        pairs = [(lists[0].get(q, []), lists[1].get(q, [])) for q in sorted(lists[0].keys() | lists[1].keys())]
        found[side] = {
            "overlap": _mean([_overlap(x, y, top) for x, y in pairs]),
            "correlation": _mean([_correlation(dict(x), dict(y)) for x, y in pairs]),
        }
    return found | _numbers(a, b)


def _lists(by_query: pa.Table, side: str) -> dict[int, list[tuple[int, float]]]:
    """Return (id, score) of every query on one side, best first."""
    lists: dict[int, list[tuple[int, float]]] = {}
    columns = [by_query[name].to_pylist() for name in ("query", "side", "id", "score")]
    for query, its_side, example, score in zip(*columns, strict=True):
        if its_side == side:
            lists.setdefault(query, []).append((example, score))
    return {query: sorted(rows, key=lambda row: (-abs(row[1]), row[0])) for query, rows in lists.items()}


def _overlap(a: list[tuple[int, float]], b: list[tuple[int, float]], top: int) -> float | None:
    size = min(top, len(a), len(b))
    if not size:
        return None
    return len({example for example, _ in a[:size]} & {example for example, _ in b[:size]}) / size


def _correlation(a: dict[int, float], b: dict[int, float]) -> float | None:
    common = sorted(a.keys() & b.keys())
    return _spearman(np.array([a[i] for i in common]), np.array([b[i] for i in common]))


def _numbers(a: ScoreIndex, b: ScoreIndex) -> dict[str, Any]:
    names = ["id", "source_id", "self_influence", "total"]
    first, second = (pa.Table.from_batches(list(index.table("by_example", names))) for index in (a, b))
    _same(first, second, "id", "source_id")
    joined = first.join(second, "id", right_suffix="_b", join_type="inner")
    return {
        name: _spearman(joined[name].to_numpy().astype(float), joined[f"{name}_b"].to_numpy().astype(float))
        for name in ("self_influence", "total")
    }


def _same(a: pa.Table, b: pa.Table, key: str, name: str) -> None:
    """Raise ValueError where the same row stands for something else in the two."""
    if name not in a.column_names or name not in b.column_names:
        return
    names = dict(zip(a[key].to_pylist(), a[name].to_pylist(), strict=True))
    for row, other in zip(b[key].to_pylist(), b[name].to_pylist(), strict=True):
        if row in names and names[row] != other:
            raise ValueError(f"{key} {row} is {names[row]!r} in one and {other!r} in the other: compare the same data")


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    good = np.isfinite(a) & np.isfinite(b)
    a, b = a[good], b[good]
    if len(a) < FEWEST or (a == a[0]).all() or (b == b[0]).all():
        return None
    return float(spearmanr(a, b).statistic)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def show(found: dict[str, Any], console: Console) -> None:
    """Print a comparison for a person."""
    table = Table(title=f"{found['a']} beside {found['b']}, means over the queries", title_justify="left")
    for column in ("", f"overlap of the top {found['top']}", "rank correlation of those both keep"):
        table.add_column(column, justify="right" if column else "left")
    for side in SIDES:
        table.add_row(f"{side}s", _said(found[side]["overlap"]), _said(found[side]["correlation"]))
    console.print(table)
    for name in ("self_influence", "total"):
        console.print(f"rank correlation of {name.replace('_', '-')} over all examples: {_said(found[name])}")


def _said(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(
    run_a: Annotated[str, typer.Argument(help="folder or s3://bucket/prefix of a run")],
    run_b: Annotated[str, typer.Argument(help="another, or the same one")],
    scores_a: Annotated[str | None, typer.Option(help="label of the scores, if the run holds several")] = None,
    scores_b: Annotated[str | None, typer.Option(help="label of the scores, if the run holds several")] = None,
    top: Annotated[int, typer.Option(help="how many on each side the overlap is of")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print overlap and rank correlation of two scorings."""
    find_modules_here()
    with plain_errors():
        found = compare(Run.open(run_a).index(scores_a), Run.open(run_b).index(scores_b), top)
        if as_json:
            print(json.dumps(found))
        else:
            show(found, Console())


if __name__ == "__main__":
    run_command(main)
