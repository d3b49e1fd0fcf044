"""Ask a run: which training examples moved this prediction?

python launch/query.py RUN --query 17                 a stored query, by its row
python launch/query.py RUN --query source:3170        … by the corpus's own id
python launch/query.py RUN --text "a new sentence"    a new one, under --label or the model's own prediction
python launch/query.py RUN --query 17 --url http://…  a run that a service has, by its name there
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.collapse import collapse_rows, shortfall
from launch.command import find_modules_here, run_command
from launch.messages import plain_errors
from launch.run import Run
from storage.index import ScoreIndex
from storage.rows import OWN

SIDES = {"proponents": "training on them lowered its loss", "opponents": "training on them raised it"}
OF_LOGITS = {"proponents": "they raise the logit of its class", "opponents": "they lower it"}
_SAID = ("source_id", "label", "labels", "target")  # in the first line on a query
_LONGEST = 16  # numbers of a list that is shown
_STRONG = 0.3  # share of the strongest token's score from which a token is marked


@dataclass(frozen=True)
class Asked:
    """The rows of an answer, and of what query."""

    query: dict[str, Any]
    sides: dict[str, list[dict[str, Any]]]
    search: str = "exact"
    recall: dict[str, float] | None = None


def answer(
    run: Run,
    query: str | None,
    text: str | None = None,
    label: str | None = None,
    top: int = 5,
    scores: str | None = None,
    exact: bool = False,
    collapse: bool = False,
    tokens: bool = False,
    yes: bool = False,
) -> dict[str, Any]:
    """Return the answer as `--json` prints it: query, method, score_unit, proponents and opponents, best first.

    Rows without a text carry the example's own `fields`; with `collapse` the ids of `near_identical` examples, and
    with `tokens` what every token contributes to the score. Scores that cannot answer a new query at once start a job
    with `yes`; without it ValueError says how long that takes.
    """
    if (query is None) == (text is None):
        raise ValueError("give either --query (a stored query) or --text (a new one)")
    index = run.index(scores)
    kept = index.meta["top_k"]
    if not 1 <= top <= kept:
        raise ValueError(f"--top {top} is not allowed: 1 to {kept}, which output.top_k kept")
    wanted = kept if collapse else top
    row = None if query is None else run.query_row(query, index)
    if row is not None and label is None:
        asked = ask_stored(run, index, row, wanted)
    else:
        asked = ask_now(run, index, row, text, label, wanted, exact, yes)
    found = {
        "query": shown(asked.query), "method": index.meta["method"], "score_unit": index.meta["score_unit"],
        "scores": index.label, "search": asked.search,
    }  # fmt: skip
    found |= {} if asked.recall is None else {"recall": asked.recall}
    found |= collapsed(run, index, asked.sides, top) if collapse else asked.sides
    add_fields(run, index, found)
    if tokens:
        add_tokens(run, index, found, row if label is None and row is not None else asked.query)
    return found


def ask_stored(run: Run, index: ScoreIndex, row: int, k: int) -> Asked:
    """Return a stored query with its stored answer."""
    record = run.queries(index).row(row)
    return Asked(record | {"id": row}, dict(zip(SIDES, map(plain, index.top(row, k)), strict=True)))


def ask_now(
    run: Run, index: ScoreIndex, row: int | None, text: str | None, label: str | None, k: int, exact: bool, yes: bool
) -> Asked:
    """Return the answer to a new text, or to a stored query under another label."""
    from launch.online import answers_at_once, text_field

    labels = None if label in (None, "predicted") else [label]
    setting = run.setting(index.label)
    if not answers_at_once(setting):
        from launch.later import answer_later, refuse_unasked

        if not yes:
            refuse_unasked(run, setting)
        field = text_field(setting)
        found = answer_later(
            run, setting, {field: text if row is None else run.queries(index).row(row)[field]}, labels, k
        )
    elif row is None:
        [found] = run.score([str(text)], labels, k, index.label, exact)
    else:
        [found] = run.ask([run.queries(index).row(row)], labels, k, setting, exact)
    sides = {"proponents": found.proponents, "opponents": found.opponents}
    return Asked(found.query | {"id": row}, sides, found.search, found.recall)


def collapsed(run: Run, index: ScoreIndex, sides: dict[str, list[dict[str, Any]]], k: int) -> dict[str, Any]:
    """Return the first k groups of either side, how many there are, and what there is to say where they are fewer."""
    corpus, field = run.corpus(index), index.meta["fields"]["text"]
    groups = {side: collapse_rows(rows, corpus, field, k) for side, rows in sides.items()}
    notes = [shortfall(own, side, k, index.meta["top_k"]) for side, own in groups.items()]
    about = {side: {"looked_at": own.looked_at, "groups": own.count} for side, own in groups.items()}
    return {side: own.rows for side, own in groups.items()} | {
        "collapsed": about | {"notes": [note for note in notes if note]}
    }


def add_fields(run: Run, index: ScoreIndex, found: dict[str, Any]) -> None:
    """Give rows without a text the fields of their record, so that a person sees what they are."""
    corpus = run.corpus(index)
    for row in (row for side in SIDES for row in found[side]):
        if not row["snippet"] and row["id"] not in corpus.erased():
            row["fields"] = own_fields(corpus.row(row["id"]), index)


def own_fields(record: dict[str, Any], index: ScoreIndex) -> dict[str, Any]:
    """Return what of a record is the corpus's own and no label, which has a place of its own."""
    left_out = {*OWN, index.meta["fields"]["label"]}
    return {name: value for name, value in shown(record).items() if name not in left_out}


def add_tokens(run: Run, index: ScoreIndex, found: dict[str, Any], query: int | dict[str, Any]) -> None:
    """Give every row its tokens, each with what it contributes to the score."""
    rows = [row for side in SIDES for row in found[side]]
    for row, own in zip(rows, run.tokens(query, [row["id"] for row in rows], index.label), strict=True):
        row["tokens"] = [{"token": t, "score": s} for t, s in zip(own.tokens, own.scores, strict=True)]


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that JSON can hold and a person can read: no images, no long lists."""
    held = {
        name: value.tolist() if isinstance(value, np.ndarray | np.generic) else value for name, value in record.items()
    }
    return {k: v for k, v in held.items() if v is None or isinstance(v, str | int | float | bool) or _short(v)}


def _short(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _LONGEST and all(isinstance(v, Real) for v in value)


def plain(table: Any) -> list[dict[str, Any]]:
    """Return index rows without the columns that say which query they belong to."""
    keep = [name for name in table.column_names if name not in ("query", "query_source_id", "side", "rank")]
    return table.select(keep).to_pylist()


def show(found: dict[str, Any], console: Console) -> None:
    """Print an answer for a person."""
    query = found["query"]
    text = next((query[k] for k in ("text", "snippet") if isinstance(query.get(k), str)), "")
    said = ", ".join(f"{k}={query[k]}" for k in _SAID if query.get(k) is not None)
    console.print(f"[bold]query {query['id'] if query['id'] is not None else '(new)'}[/]  {said}", highlight=False)
    text = text or in_words({k: v for k, v in query.items() if k not in {*OWN, *_SAID}})
    if text:
        console.print(f"  {text}", markup=False, highlight=False)
    searched = found.get("search", "exact")
    how = "" if searched == "exact" else f"; found by the {searched} index, which finds {shares(found['recall'])}"
    console.print(f"{found['method']}, scores in units of {found['score_unit']}{how}", style="dim", highlight=False)
    for side, meaning in (OF_LOGITS if found["score_unit"] == "logit" else SIDES).items():
        console.print(side_table(f"{side}: {meaning}", found[side]), markup=False)
    for note in found.get("collapsed", {}).get("notes", []):
        console.print(f"only {note}", style="dim", highlight=False)


def shares(recall: dict[str, float]) -> str:
    return " and ".join(f"{share:.1%} of the {side}" for side, share in recall.items())


def side_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Return one side of an answer as a table."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in ("score", "id", "label", "text"):
        table.add_column(column, justify="right" if column in ("score", "id") else "left")
    for row in rows:
        table.add_row(f"{row['score']:+.4g}", str(row["id"]), row["label"] or "", said_of(row))
    return table


def said_of(row: dict[str, Any]) -> Text:
    """Return what the last column says of an example: its text or fields, and how many say the same."""
    if row.get("tokens"):
        text = highlighted(row["tokens"])
    elif row.get("fields"):
        text = Text(in_words(row["fields"]))
    else:
        text = Text(row["snippet"])
    others = row.get("near_identical") or []
    return text.append(f" +{len(others)} near-identical: {', '.join(map(str, others))}", "dim") if others else text


def in_words(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={in_short(value)}" for name, value in fields.items())


def in_short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(in_short, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def highlighted(tokens: Iterable[dict[str, Any]]) -> Text:
    """Return the text with strong tokens marked: green raises the score, red lowers it, bold the strongest."""
    tokens = list(tokens)
    strongest = max((abs(token["score"]) for token in tokens), default=0.0)
    text = Text()
    for token in tokens:
        share = abs(token["score"]) / strongest if strongest else 0.0
        colour = "green" if token["score"] > 0 else "red"
        text.append(token["token"], "" if share < _STRONG else f"bold {colour}" if share > 2 * _STRONG else colour)
    return text


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
    collapse: Annotated[
        bool, typer.Option("--collapse", help="show near-identical texts once; --top counts groups")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="what each token contributes (language models)")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="start the job that a new query may take")] = False,
    url: Annotated[str | None, typer.Option(help="address of a service (launch/serve.py) that has RUN by name")] = None,
    token: Annotated[str | None, typer.Option(envvar="INFLUENCE_TOKEN", help="token for that service")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print the proponents and opponents of a prediction."""
    find_modules_here()
    with plain_errors():
        if url is None:
            found = answer(Run.open(run), query, text, label, top, scores, exact, collapse, tokens, yes)
        else:
            if exact or collapse or tokens or yes:
                raise ValueError(
                    "--exact, --collapse, --tokens and --yes are not allowed with --url: ask the run itself"
                )
            from launch.client import Client, ask  # half a second that stored answers do without

            with Client(url, token) as service:
                found = ask(service, run, query, text, label, top, scores)
        if as_json:
            print(json.dumps(found, ensure_ascii=False))
        else:
            show(found, Console())


if __name__ == "__main__":
    run_command(main)
