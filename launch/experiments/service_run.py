"""Runs that the service's experiments serve: a small one made by the real job, and a large index of made-up scores."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from launch.config import make_config
from launch.job import score
from storage.corpus import ingest
from storage.index import write_index
from storage.locations import Location

LABEL = "made-up"
CHECKPOINT = {"name": "only", "uri": "nowhere", "step": 1, "learning_rate": 0.1, "fingerprint": ""}
_STEP = 20_000  # examples written at once


def small_run(config: dict[str, Any]) -> Path:
    """Return the run `reviews` of a tiny BERT, alone in its folder; made once for a config, and gone with the process."""
    keys = ("tokenizer", "shape", "corpus", "queries", "rows", "asked")
    return _small_run(json.dumps({key: config[key] for key in keys}))


@lru_cache(maxsize=2)
def _small_run(config: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="influence-service-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_small_run(folder, json.loads(config))


def make_small_run(folder: Path, config: dict[str, Any]) -> Path:
    """Score a few reviews under two checkpoints of a tiny BERT, once online and once without a store; return the run."""
    run = folder / "reviews"
    tokenizer = str(Location.parse(config["tokenizer"]).fetch(folder))
    checkpoints = []
    for step in (1, 2):
        model = folder / f"checkpoint-{step}"
        BertForSequenceClassification(BertConfig(**config["shape"])).save_pretrained(model)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(model)
        checkpoints.append({"path": str(model), "learning_rate": 0.1, "step": step})
    job: dict[str, Any] = {
        "run": str(run), "task": {"settings": {"max_tokens": 32}}, "checkpoints": checkpoints,
        "corpus": {"path": config["corpus"], "limit": config["rows"]},
        "queries": {"name": "asked", "path": config["queries"], "limit": config["asked"]},
        "gradients": {"modules": ["*classifier*", "*pooler*"], "coverage": 0},
        "cluster": {"backend": "in-process"}, "output": {"top_k": 10, "label": "online"},
    }  # fmt: skip
    score(make_config(job), lambda _: None)
    job["gradients"] |= {"store": False}
    score(make_config(job | {"output": {"top_k": 10, "label": "offline"}}), lambda _: None)
    return run


def large_run(folder: Path, examples: int, queries: int, k: int) -> Path:
    """Write a run as a finished job leaves it, its scores made up: `k` proponents and opponents of every query."""
    run = Location.parse(str(folder))
    generator = np.random.default_rng(0)
    for name, count in (("train", examples), ("asked", queries)):
        rows = (({"id": f"{name}-{i}", "text": f"made-up text {i} " * 8, "label": i % 2}, name) for i in range(count))
        ingest(run, name, rows, lambda record: [{"target": record["label"]}])
    run.create_json("manifest.json", {"task": "text-classification", "granularity": "document"})
    record = {
        "method": "tracin", "method_settings": {}, "queries": "asked", "corpus": "train", "home": None, "stored": False,
        "checkpoints": [CHECKPOINT["name"]], "top_k": k, "shard_rows": examples,
        "model": {"task": "text-classification", "task_settings": {}},
    }  # fmt: skip
    run.create_json(f"stages/score-{LABEL}.json", record)
    meta = {"method": "tracin", "score_unit": "made up", "top_k": k, "queries": "asked", "checkpoints": [CHECKPOINT]}
    fields = {"fields": {"text": "text", "label": "label"}}
    tables = (by_query(generator, examples, queries, k), by_example(generator, examples), query_table(queries))
    write_index(run, LABEL, meta | fields, *tables)
    return folder


def by_query(generator: np.random.Generator, examples: int, queries: int, k: int) -> Iterator[pa.Table]:
    """Yield every query's neighbours, drawn at random."""
    for query in range(queries):
        ids = generator.choice(examples, 2 * k, replace=False)
        scores = np.sort(generator.exponential(size=(2, k)))[:, ::-1] * [[1], [-1]]
        yield pa.table(
            {
                "query": np.full(2 * k, query), "query_source_id": [f"asked-{query}"] * (2 * k),
                "side": ["proponent"] * k + ["opponent"] * k, "rank": np.tile(np.arange(k), 2), "id": ids,
                "score": scores.reshape(-1), **brief("train", ids),
            }
        )  # fmt: skip


def by_example(generator: np.random.Generator, examples: int) -> Iterator[pa.Table]:
    """Yield made-up numbers of every example."""
    for begin in range(0, examples, _STEP):
        ids = np.arange(begin, min(begin + _STEP, examples))
        numbers = {name: generator.exponential(size=len(ids)) for name in ("self_influence", "total", "loss")}
        yield pa.table({"id": ids, **numbers, "quarantined": np.zeros(len(ids), dtype=bool), **brief("train", ids)})


def query_table(queries: int) -> Iterator[pa.Table]:
    ids = np.arange(queries)
    predicted = {"predicted": [str(i % 3 % 2) for i in ids], "misclassified": ids % 3 % 2 != ids % 2}
    yield pa.table({"query": ids, **predicted, "loss": ids / queries, **brief("asked", ids)})


def brief(name: str, ids: np.ndarray) -> dict[str, list[str]]:
    return {
        "source_id": [f"{name}-{i}" for i in ids],
        "label": [str(i % 2) for i in ids],
        "snippet": [f"made-up text {i} " * 8 for i in ids],
    }
