"""Reading a finished run's scores, and the oracle's answer to the same question."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.context import make_task
from actors.score import load_scores
from actors.specs import ModelSpec
from engine.batches import Batch
from engine.tasks.contract import Task
from engine.tasks.text import model_inputs
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


@dataclass(frozen=True)
class Matrices:
    """What influence scores of the last checkpoint are made of, every entry by itself: float64."""

    curvature: Tensor  # (n, p, p) of every training example
    train: Tensor  # [n, p] gradients
    asked: Tensor  # [Q, p]

    def scores(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Return ∇ℓ(z)ᵀ f(C) ∇ℓ(q) / n, [n, Q], with f applied to the eigenvalues of the mean C."""
        x = oracles.filtered(self.curvature.mean(0), self.asked.T, function)
        return (self.train @ x / len(self.train)).numpy()

    def bound(self, damping: float) -> np.ndarray:
        """Return what a score is at most, [n, Q]: what a tolerance is relative to."""
        return np.outer(self.train.norm(dim=1), self.asked.norm(dim=1)) / damping / len(self.train)


def matrices(run: Run, names: list[str], kind: str = "gauss-newton") -> Matrices:
    """Return the last checkpoint's gradients and curvatures over these parameters, of a sequence classifier."""
    task, train, asked = collated(run)
    model = task.build(Path(run.checkpoints()[-1].uri)).double().eval()

    def outputs(model: nn.Module, batch: Batch) -> Tensor:
        return model(**model_inputs(batch)).logits

    def of_one(position: int) -> Tensor:
        one = oracles.one_example(train, position)
        if kind == "hessian":
            return oracles.hessian(model, task.loss, one, names)
        return oracles.gauss_newton(model, outputs, lambda out, _: oracles.softmax_hessian(out), one, names)

    rows = [oracles.flat(oracles.gradients(model, task.loss, batch), names) for batch in (train, asked)]
    return Matrices(torch.stack([of_one(i) for i in range(len(train))]), *rows)


def collated(run: Run) -> tuple[Task, Batch, Batch]:
    """Return the task and all training examples and queries, each in one batch."""
    manifest = run.location.read_json("manifest.json")
    spec = ModelSpec(manifest["task"], manifest["settings"], run.checkpoints(), "float32", "sdpa")
    task = make_task(spec, Path(run.checkpoints()[0].uri), Path("unused"))
    train, asked = (task.collate(everything(run, name)) for name in ("train", "asked"))
    return task, train, asked


def oracle_scores(
    run: Run, model_folder: Path, names: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return TracInCP by the autograd loop in float64, self-influence, and the bound Σ η ‖g_z‖ ‖g_q‖ of a tolerance."""
    task, train, asked = collated(run)
    scores, own, bound = 0.0, 0.0, 0.0
    for checkpoint in run.checkpoints():
        model = task.build(Path(checkpoint.uri)).double().eval()
        a, b = (oracles.flat(oracles.gradients(model, task.loss, batch), names) for batch in (train, asked))
        scores += checkpoint.learning_rate * (a @ b.T).numpy()
        own += checkpoint.learning_rate * a.square().sum(1).numpy()
        bound += checkpoint.learning_rate * np.outer(a.norm(dim=1).numpy(), b.norm(dim=1).numpy())
    return np.asarray(scores), np.asarray(own), np.asarray(bound)
