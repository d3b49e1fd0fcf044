"""The job that chaos works on: reviews under checkpoints of a tiny BERT, in many short units; and what it must leave."""

import hashlib
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from engine.batches import Batch
from engine.tasks.text_classification import TextClassification
from launch.config import make_config
from launch.experiments.subjects import ROOT, fetch
from launch.job import score
from storage.index import ScoreIndex
from storage.locations import Location
from storage.verify import OF_ROWS

LABEL = "chaos"
FOLDERS = ("gradients", "scores", "index")  # whose bytes must be those of an undisturbed run
OF_UNIT = re.compile(r"journal/(?P<stage>[^/]+)/(?P<unit>.+)/done\.(?P<number>\d+)$")
PACED = ("collect-", "compute-")  # the stages whose units take as long as the pace says
COUNTED = (*PACED, "score-")  # the stages whose units are shards
SPOILED = (*COUNTED, "prepare-")  # the stages whose objects may be hit


class Paced(TextClassification):
    """Text classification whose batches take longer while the file `pace` is there: by the seconds that it holds."""

    def __init__(self, pace: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.pace = Path(pace)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled() and self.pace.exists():
            time.sleep(float(self.pace.read_text() or 0))
        return super().loss(model, batch)


def make_job(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoints into `folder` and return the job's config, without its run and cluster."""
    tokenizer = fetch(config["tokenizer"])
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**config["shape"]))
    checkpoints = []
    for step in range(1, config["checkpoints"] + 1):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn_like(weight)
        path = folder / f"checkpoint-{step}"
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
        checkpoints.append({"path": str(path), "learning_rate": 0.1 / step, "step": step})
    settings = {"pace": str(folder / "pace"), "max_tokens": 32, "tokenizer": str(tokenizer)}
    return {
        "task": {"name": f"{Paced.__module__}:Paced", "settings": settings},
        "checkpoints": checkpoints,
        "corpus": {"path": str(ROOT / config["corpus"]), "limit": config["rows"]},
        "queries": {"name": "asked", "path": str(ROOT / config["queries"]), "limit": config["asked_rows"]},
        "gradients": {
            "modules": config["modules"], "coverage": 0, "shard_rows": config["shard_rows"], "token_budget": 1024,
            "store": config["store"],
        },
        "output": {"top_k": 20, "label": LABEL, "dense": True},
    }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a run has left."""

    objects: dict[str, str]  # SHA-256 by key
    rows: Counter[tuple[str, int]]  # how often each row stands in the index, or was done by a unit, by what and id
    records: list[str]  # the done-records of its units, each `stage/unit`


def undisturbed(folder: Path, job: dict[str, Any]) -> Outcome:
    """Return what the job leaves when nothing happens to it, in this process."""
    where = folder / "undisturbed"
    score(make_config(job | {"run": str(where), "cluster": {"backend": "in-process"}}), lambda _: None)
    return outcome(Location.parse(str(where)))


def outcome(run: Location) -> Outcome:
    keys = [key for name in FOLDERS for key in run.list(name)]
    objects = {key: hashlib.sha256(run.read(key)).hexdigest() for key in keys}
    rows: Counter[tuple[str, int]] = Counter()
    for batch in ScoreIndex.open(run, LABEL).table("by_example", ["id"]):
        rows.update(("index", row) for row in batch["id"].to_pylist())
    journal = run.list("journal")
    done = [found for key in journal if (found := OF_UNIT.match(key))]
    for one in done:
        place = OF_ROWS.search(one["unit"])
        if place and one[0].replace("/done.", "/damaged.") not in journal:
            what, start = f"{one['stage']} {one['unit'][: place.start()]}", int(place["start"])
            rows.update((what, start + row) for row in range(run.read_json(one[0])["rows"]))
    return Outcome(objects, rows, sorted({f"{one['stage']}/{one['unit']}" for one in done}))


def done_units(run: Location, stages: tuple[str, ...] = COUNTED) -> list[str]:
    """Return the keys of the done-records of these stages' units."""
    found = (OF_UNIT.match(key) for key in run.list("journal"))
    return [one[0] for one in found if one and one["stage"].startswith(stages)]


@dataclass(frozen=True)
class Corruption:
    """One object that was altered, and the unit that had written it."""

    stage: str
    unit: str
    key: str

    def is_named(self, said: str, damages: list[dict[str, Any]]) -> bool:
        """Tell whether a job or a verification named it: by its key, or by its unit where it was met on reading."""
        met = f"It is of unit {self.unit} of stage {self.stage}." in said
        return met or any((one["key"], one["unit"]) == (self.key, self.unit) for one in damages)


def corrupt(run: Location, draw: random.Random, taken: list[Corruption]) -> Corruption:
    """Flip a bit of a finished object, or cut it off; never one of a unit in `taken`. Returns which."""
    before = {(one.stage, one.unit) for one in taken}
    keys = done_units(run, SPOILED)
    draw.shuffle(keys)
    for noted in keys:
        place = OF_UNIT.match(noted)
        assert place is not None
        objects = [one["key"] for one in run.read_json(noted)["objects"] if run.exists(one["key"])]
        if objects and (place["stage"], place["unit"]) not in before:
            key = draw.choice(objects)
            run.replace(key, spoiled(run.read(key), draw))
            return Corruption(place["stage"], place["unit"], key)
    raise ValueError(f"{run.uri} has no object that could be spoiled")


def spoiled(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    if draw.random() < 0.5:
        return data[:at]
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def verdict(run: Location, expected: Outcome) -> dict[str, Any]:
    """Return how a finished run differs from an undisturbed one: objects by key, rows lost or doubled."""
    found = outcome(run)
    keys = found.objects.keys() | expected.objects.keys()
    rows = found.rows.keys() | expected.rows.keys()
    return {
        "objects": len(found.objects),
        "differ": sorted(key for key in keys if found.objects.get(key) != expected.objects.get(key)),
        "strayed_rows": sum(abs(found.rows[row] - expected.rows[row]) for row in rows),
    }


def write_job(file: Path, job: dict[str, Any]) -> None:
    file.write_text(json.dumps(job, indent=1))  # which is YAML too
