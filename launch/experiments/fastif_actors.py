"""The pieces of one query's influence, each timed on actors: the job's own units on a run with MiniLM as it was trained.

What a job does besides (λ_max, the scale of batches, residuals, the query's own gradient, top-k, index) is not done here.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from actors.candidates import find_candidates
from actors.compute import block_key
from actors.context import make_task
from actors.operator import MemoryJournal
from actors.plan import checkpoint_units, shard_rows, shards
from actors.pool import Pool
from actors.run_stage import run_stage
from actors.specs import CheckpointSpec, CurvatureSpec, GradientSpec, ModelSpec, ScoreSpec
from actors.states import gradients_key, save_state, state_key
from actors.units import Stage, Unit
from engine.coordinates import Coordinates, chosen_coordinates, top_layers
from engine.memory import CPU_TOKENS
from engine.methods.contract import QueryState
from engine.methods.nearest import Nearest
from engine.models import save_checkpoint, start_hugging_face
from engine.projection import Projection
from engine.stochastic_solvers import Lissa
from engine.tasks.contract import encode
from launch.experiments.fastif_minilm import MiniLM, query_gradients
from launch.experiments.subjects import ROOT, fetch
from launch.experiments.two_actors import pool_of
from storage.checkpoints import fingerprint
from storage.corpus import Corpus, ingest
from storage.locations import Location
from storage.readers import read_records

TRAIN, ASKED, CHECKPOINT, FOLDER = "train", "asked", "c0", "pooled"


@dataclass(frozen=True)
class Timed:
    """A run with the model, some of its training examples and one query, and the pools of one and of two actors."""

    run: Location
    one: Pool
    two: Pool
    train: Corpus
    asked: Corpus
    settings: dict[str, Any]  # of every unit
    weights: Coordinates
    pieces: list[dict[str, Any]]  # shards of train

    def solve(self, pool: Pool, name: str, lissa: Lissa, largest: float, ids: np.ndarray) -> tuple[float, Tensor]:
        """Return the seconds of a solve by LiSSA, its repetitions side by side, and their mean, (size, 1)."""
        keys = [f"states/{ASKED}/lissa/{name}-{t}" for t in range(lissa.repetitions)]
        units = [Unit(key, {"first": 0, "last": 1, "repetition": t, "key": key}) for t, key in enumerate(keys)]
        told = self.settings | {"ids": ids, "lissa": lissa, "largest": largest, "l2": 0.0, "label": ASKED}
        began = time.perf_counter()
        run_stage(pool, Stage("lissa", "lissa", told, units), MemoryJournal())
        found = torch.stack([torch.from_numpy(safetensors.numpy.load(self.run.read(key))["x"]) for key in keys]).mean(0)
        return time.perf_counter() - began, found

    def score(
        self, pool: Pool, label: str, x: Tensor, candidates: np.ndarray | None
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the seconds of scoring along x all examples, or some, which are then read alone; their ids and scores."""
        chosen = None if candidates is None else torch.from_numpy(candidates)[None]
        state = QueryState(arrays_of(self.weights, x), None, torch.zeros(1).double(), 1.0, (0,), chosen)
        spec = ScoreSpec(label, "fastif", {}, (CHECKPOINT,), ASKED, TRAIN, None, False, 1)
        units = checkpoint_units((CHECKPOINT,), self.pieces, TRAIN)
        began = time.perf_counter()
        self.run.create(state_key(label, CHECKPOINT), save_state(state))
        run_stage(pool, Stage("compute", "compute", self.settings | {"score": spec}, units), MemoryJournal())
        seconds = time.perf_counter() - began
        blocks = [safetensors.numpy.load(self.run.read(block_key(label, unit.payload))) for unit in units]
        ids = np.arange(self.train.rows) if candidates is None else np.sort(candidates)
        return seconds, ids, np.concatenate([block["scores"][:, 0] for block in blocks]) / self.train.rows

    def features(self, pool: Pool) -> float:
        """Leave the features of all examples and of the query; return the seconds."""
        told = self.settings | {"token_budget": CPU_TOKENS, "features": "pooled", "folder": FOLDER}
        units = [*checkpoint_units((CHECKPOINT,), self.pieces, TRAIN), *self._asked_units()]
        began = time.perf_counter()
        run_stage(pool, Stage("features", "features", told, units), MemoryJournal())
        return time.perf_counter() - began

    def search(self, count: int) -> tuple[float, np.ndarray]:
        """Return the seconds of finding the query's nearest examples by their features, and their ids, nearest first."""
        payloads = [unit.payload for unit in checkpoint_units((CHECKPOINT,), self.pieces, TRAIN)]
        own = [unit.payload for unit in self._asked_units()]
        began = time.perf_counter()
        nearest = Nearest(count, "pooled", anchors=False, recall_sample=1)
        found = find_candidates(self.run, self.train, self.asked, payloads, own, FOLDER, nearest, seed=0)
        return time.perf_counter() - began, found["candidates"][0]

    def _asked_units(self) -> list[Unit]:
        return checkpoint_units((CHECKPOINT,), [piece | {"home": None} for piece in shards(self.asked, 1)], ASKED)


@contextmanager
def timed_run(config: dict[str, Any], subject: MiniLM, rows: int, query: int, folder: Path) -> Iterator[Timed]:
    """Give a run with the first training examples and one test review, and its pools, in this process at toy size."""
    settings, b = config["minilm"], query_gradients(subject, subject.subject.parts["test"].take(torch.tensor([query])))
    network = whole_model(settings, subject)
    save_checkpoint(network, folder / CHECKPOINT)
    checkpoint = CheckpointSpec(CHECKPOINT, str(folder / CHECKPOINT), 0, 1.0, fingerprint(folder / CHECKPOINT))
    task_settings = {"tokenizer": str(fetch(settings["base"])), "max_tokens": settings["max_tokens"]}
    model = ModelSpec("text-classification", task_settings, (checkpoint,), "float32", "sdpa")
    task = make_task(model, folder / CHECKPOINT, folder / "cache")
    run = Location.parse(str(folder / "run"))
    for name, part, first, last in ((TRAIN, "train", 0, rows), (ASKED, "test", query, query + 1)):
        records = islice(read_records(str(ROOT / settings["data"].format(part=part))), first, last)
        ingest(run, name, records, partial(encode, task))
    weights = chosen_coordinates(network, top_layers(network, settings["top_layers"]))
    run.create(gradients_key(ASKED, CHECKPOINT), save_state(QueryState(
        arrays_of(weights, b), None, torch.zeros(1).double(), 1.0, (0,)
    )))  # fmt: skip
    names = tuple(weight.name for weight in weights.weights)
    told = {
        "model": model,
        "gradients": GradientSpec(names, Projection("none"), False, CPU_TOKENS),
        "curvature": CurvatureSpec(CHECKPOINT, "gauss-newton", "float32", TRAIN, None),
    }
    train = Corpus.open(run, TRAIN)
    length = shard_rows(train, sum(weight.numel() for weight in network.parameters()), 0, 4)
    pieces = [piece | {"home": None} for piece in shards(train, length)]
    with ExitStack() as stack:
        one, two = (stack.enter_context(pool_of(config, run.uri, workers)) for workers in (1, 2))
        yield Timed(run, one, two, train, Corpus.open(run, ASKED), told, weights, pieces)


def whole_model(settings: dict[str, Any], subject: MiniLM) -> nn.Module:
    """Return the subject's classifier with the frozen lower layers below it, as a checkpoint of its training holds it."""
    model: Any = start_hugging_face(fetch(settings["base"]), AutoModelForSequenceClassification, num_labels=2)
    layers, own = model.bert.encoder.layer, subject.model
    held: Any = own
    layers[-settings["top_layers"] :].load_state_dict(held.bert.encoder.layer.state_dict())
    model.bert.pooler.load_state_dict(held.bert.pooler.state_dict())
    model.classifier.load_state_dict(held.classifier.state_dict())
    return model.eval()


def arrays_of(weights: Coordinates, vector: Tensor) -> dict[str, Tensor]:
    """Return a vector (size, 1) as a state holds it, float32."""
    return {name: part.float().contiguous() for name, part in weights.split(vector).items()}
