"""The demo: fine-tune MiniLM on 2,000 movie reviews with 5 % of the labels flipped on purpose, score, and look.

    make demo

Shows (a) what taught the model three of its mistakes on held-out reviews, and (b) how many of the flipped labels
self-influence finds, beside plain loss and chance. Run again, it resumes; `rm -rf runs/demo` starts over.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from engine.counters import derive_key, permutation
from engine.metrics import found_in_top
from launch.config import load_config
from launch.job import score
from launch.messages import plain_errors
from launch.query import answer, show
from launch.run import Run
from launch.sources import TRAIN
from launch.train import train_model
from storage.corpus import Corpus

CONFIG = "configs/tracin.yaml"
SOURCE = Path("tests/data/movie_reviews.train.jsonl.gz")
ROWS, FLIPPED = 2000, 0.05


def write_corpus(path: Path) -> None:
    """Write the first 2,000 clearly rated reviews, 5 % of them with the label turned round and `flipped` set."""
    with gzip.open(SOURCE, "rt") as file:
        rows = [row for row in map(json.loads, file) if abs(row["score"]) >= 1][:ROWS]
    for i in permutation(derive_key(0, "flipped"), len(rows))[: round(FLIPPED * len(rows))]:
        rows[i] |= {"label": 1 - rows[i]["label"], "flipped": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"flipped": False} | row) + "\n" for row in rows))


def mistakes(run: Run, count: int) -> list[int]:
    """Return the stored queries that the last checkpoint gets most wrong: the largest losses above ln 2."""
    losses = query_losses(run)
    order = np.argsort(-losses, kind="stable")[:count]
    return [int(i) for i in order if losses[i] > np.log(2)]


def mark_flipped(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Return the answer with a star at every label that the demo itself turned round."""
    corpus = Corpus.open(run.location, TRAIN)
    starred = {
        side: [row | {"label": row["label"] + "*" * corpus.row(row["id"])["flipped"]} for row in found[side]]
        for side in ("proponents", "opponents")
    }
    return found | starred


def query_losses(run: Run) -> np.ndarray:
    """Return every stored query's loss at the last checkpoint."""
    return run.states()[-1].losses.numpy()


def noise_table(run: Run) -> Table:
    """Return how many of the flipped labels stand at the top by self-influence, by loss and by chance."""
    index = run.index()
    columns = pa.Table.from_batches(index.table("by_example", ["self_influence", "loss"]))
    corpus = Corpus.open(run.location, TRAIN)
    rows: list[dict[str, Any]] = [row for s in corpus.segments for row in corpus.read(s, 0, s.rows)]
    flipped = np.array([row["flipped"] for row in rows])
    table = Table()
    shares = (0.05, 0.10, 0.20)
    for name in (f"{flipped.sum()} of {len(rows)} flipped", *(f"{share:.0%}" for share in shares)):
        table.add_column(name, justify="left" if "flipped" in name else "right")
    for name in ("self_influence", "loss"):
        scores = columns[name].to_numpy()
        cells = [f"{found_in_top(scores, flipped, share):.0%}" for share in shares]
        table.add_row(f"by {name.replace('_', '-')}", *cells)
    table.add_row("by chance", *(f"{share:.0%}" for share in shares))
    return table


def main() -> None:
    """Train, score, show."""
    console = Console()
    config = load_config(CONFIG)
    corpus, model = Path(config.corpus.path), Path(str(config.checkpoints.path))
    if not corpus.exists():
        write_corpus(corpus)
    if not list(model.glob("checkpoint-*/trainer_state.json"))[config.train.checkpoints - 1 :]:
        console.rule("fine-tune MiniLM (top two layers and head) on 2,000 reviews, 100 labels flipped")
        for partial in sorted(model.glob("checkpoint-*")):
            console.print(f"removing the unfinished {partial}")
            shutil.rmtree(partial)
        train_model(config, console.print)
    console.rule("score every training review for every test review")
    score(config, console.print)
    run = Run.open(config.run.uri)
    console.rule("(a) what taught the model these mistakes?")
    for query in mistakes(run, 3):
        show(mark_flipped(run, answer(run, str(query), None, None, 3, None)), console)
        console.print()
    console.print(
        "The opponents are the reviews that taught the mistake: training on them raised this loss. A star: flipped on purpose."
    )
    console.rule("(b) which labels are wrong?")
    console.print("flipped labels found when looking only at the top of the training set")
    console.print(noise_table(run))
    console.print(f"Ask it yourself: .venv/bin/python launch/query.py {config.run.uri} --text '…'")
    console.print(
        f"Look at it: .venv/bin/python launch/serve.py {config.run.uri}, then open http://127.0.0.1:8000/page"
    )


if __name__ == "__main__":
    with plain_errors():
        main()
