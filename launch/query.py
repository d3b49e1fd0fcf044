"""Ask a run: which training examples moved this prediction?

python launch/query.py RUN --query 17                 a stored query, by its row
python launch/query.py RUN --query source:3170        … by the corpus's own id
python launch/query.py RUN --text "a new sentence"    a new one, under --label or the model's own prediction
"""

import json
from typing import Annotated, Any

import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table

from launch.command import find_modules_here
from launch.messages import plain_errors
from launch.online import Answer
from launch.run import Run
from storage.corpus import Corpus


def answer(
    run: Run,
    query: str | None,
    text: str | None = None,
    label: str | None = None,
    top: int = 5,
    scores: str | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """Return the answer as `--json` prints it: query, method, score_unit, proponents and opponents, best first."""
    if (query is None) == (text is None):
        raise ValueError("give either --query (a stored query) or --text (a new one)")
    index = run.index(scores)
    if not 1 <= top <= index.meta["top_k"]:
        raise ValueError(f"--top {top} is not allowed: 1 to {index.meta['top_k']}, which output.top_k kept")
    about = {"method": index.meta["method"], "score_unit": index.meta["score_unit"], "scores": index.label}
    if text is not None:
        found = run.score([text], None if label in (None, "predicted") else [label], top, scores, exact)[0]
        return {"query": shown({"id": None, **found.query}), **about, **sides(found)}
    row = run.query_row(str(query), index)
    record = Corpus.open(run.location, index.meta["queries"]).row(row)
    if label is not None:
        labels = None if label == "predicted" else [label]
        found = run.ask([record], labels, top, run.setting(scores), exact)[0]
        return {"query": shown(found.query | {"id": row}), **about, **sides(found)}
    proponents, opponents = (plain(table) for table in index.top(row, top))
    return {"query": shown(record | {"id": row}), **about, "proponents": proponents, "opponents": opponents}


def sides(found: Answer) -> dict[str, Any]:
    return {"proponents": found.proponents, "opponents": found.opponents}


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a query that JSON can hold: no images, no token ids."""
    return {k: v for k, v in record.items() if v is None or isinstance(v, str | int | float | bool)}


def plain(table: pa.Table) -> list[dict[str, Any]]:
    """Return index rows without the columns that say which query they belong to."""
    keep = [name for name in table.column_names if name not in ("query", "query_source_id", "side", "rank")]
    return table.select(keep).to_pylist()


def show(found: dict[str, Any], console: Console) -> None:
    """Print an answer for a person."""
    query = found["query"]
    text = next((query[k] for k in ("text", "snippet") if isinstance(query.get(k), str)), "")
    said = ", ".join(f"{k}={query[k]}" for k in ("source_id", "label", "labels", "target") if query.get(k) is not None)
    console.print(f"[bold]query {query['id'] if query['id'] is not None else '(new)'}[/]  {said}", highlight=False)
    if text:
        console.print(f"  {text}", markup=False, highlight=False)
    console.print(f"{found['method']}, scores in units of {found['score_unit']}", style="dim", highlight=False)
    for side, meaning in (
        ("proponents", "training on them lowered its loss"),
        ("opponents", "training on them raised it"),
    ):
        table = Table(title=f"{side}: {meaning}", title_justify="left", show_edge=False)
        for column in ("score", "id", "label", "text"):
            table.add_column(column, justify="right" if column in ("score", "id") else "left")
        for row in found[side]:
            table.add_row(f"{row['score']:+.4g}", str(row["id"]), row["label"] or "", row["snippet"])
        console.print(table, markup=False)


def main(
    run: Annotated[str, typer.Argument(help="folder or s3://bucket/prefix of a run")],
    query: Annotated[str | None, typer.Option(help="row of a stored query, or source:ID")] = None,
    text: Annotated[str | None, typer.Option(help="a new text")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="label to ask with; `predicted`: the model's own, the default of a new text"),
    ] = None,
    top: Annotated[int, typer.Option(help="how many on each side")] = 5,
    scores: Annotated[str | None, typer.Option(help="label of the scores, if the run holds several")] = None,
    exact: Annotated[bool, typer.Option(help="scan the store even if there is a neighbour index")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print the proponents and opponents of a prediction."""
    find_modules_here()
    with plain_errors():
        found = answer(Run.open(run), query, text, label, top, scores, exact)
        if as_json:
            print(json.dumps(found, ensure_ascii=False))
        else:
            show(found, Console())


if __name__ == "__main__":
    typer.run(main)
