"""The sketch as a solver of the whole job: against its recursion on whole matrices, its kills, its answers to new texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.stochastic_solvers import Sketch, sketch_batches, sketch_matrix
from launch.run import Run
from tests.end_to_end.answers import Matrices, dense, digests, matrices
from tests.end_to_end.conftest import Settings, run_job
from tests.end_to_end.test_influence import ARTEFACTS, METHOD, UPPER, WHOLE, figures
from tests.end_to_end.test_same_result import Killed, kill_in

SKETCH = METHOD | {"solver": "sketch", "columns": 5, "depth": 12, "batch_size": 3}
STORED = {"gradients": WHOLE | {"store": True, "dtype": "float32"}}


def sketch_job(settings: Settings, method: dict[str, Any] | None = None, **sections: Any) -> Run:
    return run_job(settings(**{"gradients": WHOLE, "method": SKETCH | (method or {})} | sections))


def expected(found: Matrices, sketch: Sketch, batches: Callable = sketch_batches) -> np.ndarray:
    """Return the scores [n, Q] by the sketch's recursion on whole matrices."""
    n, ids = len(found.curvature), torch.arange(len(found.curvature))
    sizes = {name: int(size) for name, size in zip(UPPER, (64, 8, 24, 3), strict=True)}
    total = torch.zeros_like(found.asked.T)
    for block in range(len(sketch.blocks)):
        g = sketch_matrix(sizes, sketch, block)
        s, later = torch.zeros_like(g), list[Tensor]()
        for t in range(1, sketch.iterations + 1):
            first, second = (found.curvature[batch].mean(0) for batch in batches(ids, sketch, block, t))
            s = s - 2 * sketch.step * (first @ (second @ s - g) + sketch.damping * s)
            later += [s] if 2 * t > sketch.iterations else []
        total += torch.stack(later).mean(0) @ (g.T @ found.asked.T)
    return (found.train @ total / n).numpy()


def test_the_sketch_equals_its_recursion_on_matrices(settings: Settings) -> None:
    run = sketch_job(settings)
    found, said = matrices(run, UPPER, "hessian"), figures(run)
    sketch = Sketch(**said["sketch"])
    assert [len(block) for block in sketch.blocks] == [3, 2]
    mu = float(torch.linalg.eigvalsh(found.curvature.mean(0)).abs().max())
    assert sketch.damping == said["damping"] == pytest.approx(0.01 * mu**2, rel=0.02)
    truth = expected(found, sketch)
    bound = 1e-5 * np.abs(truth).max()
    assert (np.abs(dense(run) - truth) <= bound).all()
    assert len(said["standard_error"]) == 5
    assert all(error > 0.1 for error in said["standard_error"]), "five columns estimate badly, and say so"
    same = expected(found, sketch, lambda *at: (sketch_batches(*at)[0],) * 2)
    assert (np.abs(dense(run) - same) > bound).any(), "one batch for both gives other scores"


def test_new_texts_are_answered_from_the_sketch(settings: Settings) -> None:
    run = sketch_job(settings, **STORED)
    record = run.queries(run.index()).row(1)
    again = run.score([record["text"]], [record["label"]], k=3)[0].proponents
    kept = run.top(1, k=3).to_pylist()[:3]
    assert [row["id"] for row in again] == [row["id"] for row in kept]
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in kept], rel=1e-4)


def test_workers_and_kills_change_no_bit(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"gradients": WHOLE | {"modules": ["classifier"]}}
    one = sketch_job(settings, run=str(tmp_path / "one"), **small)
    for function, call in (("sketch", 2), ("curvature", 8)):
        with monkeypatch.context() as patch:
            kill_in(function, call, patch)
            with pytest.raises(Killed):
                sketch_job(settings, cluster={"workers": 3}, **small)
    assert digests(sketch_job(settings, **small), *ARTEFACTS) == digests(one, *ARTEFACTS)
