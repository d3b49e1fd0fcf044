"""Reading a finished run's scores, and the oracle's answer to the same question."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from actors.context import make_task
from actors.score import load_scores
from actors.specs import ModelSpec
from launch.run import Run
from storage.corpus import Corpus
from tests import oracles


def dense(run: Run, label: str = "scores") -> np.ndarray:
    """Return every stored score, float32 [N, Q], in id order."""
    keys = run.location.list(f"scores/{label}/shards")
    return np.concatenate([load_scores(run.location, key).dense for key in keys])


def self_influence(run: Run, label: str = "scores") -> np.ndarray:
    keys = run.location.list(f"scores/{label}/shards")
    return np.concatenate([load_scores(run.location, key).self_influence for key in keys])


def digests(run: Run, *folders: str) -> dict[str, bytes]:
    """Return the bytes of every object under these folders."""
    return {key: run.location.read(key) for folder in folders for key in run.location.list(folder)}


def events(run: Run) -> list[dict[str, Any]]:
    """Return all that the run's drivers wrote down."""
    keys = run.location.list("events")
    return [json.loads(line) for key in keys for line in run.location.read(key).splitlines()]


def everything(run: Run, name: str) -> list[dict[str, Any]]:
    corpus = Corpus.open(run.location, name)
    return [row for s in corpus.segments for row in corpus.read(s, 0, s.rows)]


def oracle_scores(
    run: Run, model_folder: Path, names: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return TracInCP by the autograd loop in float64, self-influence, and the bound Σ η ‖g_z‖ ‖g_q‖ of a tolerance."""
    checkpoints = run.checkpoints()
    manifest = run.location.read_json("manifest.json")
    spec = ModelSpec(manifest["task"], manifest["settings"], checkpoints, "float32", "sdpa")
    task = make_task(spec, Path(checkpoints[0].uri), Path("unused"))
    train, asked = (task.collate(everything(run, name)) for name in ("train", "asked"))
    scores, own, bound = 0.0, 0.0, 0.0
    for checkpoint in checkpoints:
        model = task.build(Path(checkpoint.uri)).double().eval()
        a, b = (oracles.flat(oracles.gradients(model, task.loss, batch), names) for batch in (train, asked))
        scores += checkpoint.learning_rate * (a @ b.T).numpy()
        own += checkpoint.learning_rate * a.square().sum(1).numpy()
        bound += checkpoint.learning_rate * np.outer(a.norm(dim=1).numpy(), b.norm(dim=1).numpy())
    return np.asarray(scores), np.asarray(own), np.asarray(bound)
