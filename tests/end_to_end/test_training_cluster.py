"""Training on two Ray Train workers: the model of one process, also when a worker is killed; mistakes are told at once."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.batches import Batch, collate_ids
from engine.models import read_state
from launch.config import make_config
from launch.train import train_model
from tests.conftest import ToyMlp, randomise

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]  # Ray Train starts its processes anew after a kill

EPOCHS, ROWS, BATCH = 4, 10, 4
LAST = EPOCHS * 3


class Watched:
    """A user's own task in float64. It notes down who computed which examples, and may be killed or fail on one of them."""

    def __init__(self, notes: str, fails_at: int = -1, dies_at: int = -1) -> None:
        self.notes, self.fails_at, self.dies_at = Path(notes), fails_at, dies_at

    def build(self, folder: Path) -> nn.Module:
        model = self.initialise(None)
        model.load_state_dict(read_state(folder))
        return model

    def initialise(self, folder: Path | None) -> nn.Module:
        return randomise(ToyMlp(inputs=2)).double()

    def collate(self, rows: list[dict]) -> Batch:
        x = torch.tensor([row["x"] for row in rows]).double()
        return Batch(collate_ids(rows), {"x": x, "y": torch.tensor([row["y"] for row in rows])})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if model.training:
            with (self.notes / str(os.getpid())).open("a") as out:
                out.write(f"{' '.join(map(str, batch.ids.tolist()))}\n")
            if self.fails_at in batch.ids:
                raise ValueError(f"example {self.fails_at} has no loss")
            self.maybe_die(batch)
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def maybe_die(self, batch: Batch) -> None:
        """End this process as the kernel would, once, on its third meeting with an example."""
        seen = (self.notes / str(os.getpid())).read_text().splitlines()
        met = sum(str(self.dies_at) in line.split() for line in seen)
        dead = self.notes / "dead"
        if met == 3 and not dead.exists():
            dead.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def config(folder: Path, workers: int, **task: Any) -> dict[str, Any]:
    rows = [{"x": [i / 10, 1.0], "y": i % 3} for i in range(ROWS)]
    folder.mkdir(exist_ok=True)
    (folder / "notes").mkdir()
    (folder / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = "tests.end_to_end.test_training_cluster:Watched"
    return {
        "run": str(folder / "run"), "checkpoints": str(folder / "out"), "corpus": str(folder / "numbers.jsonl"),
        "task": {"name": own, "settings": {"notes": str(folder / "notes")} | task},
        "train": {"epochs": EPOCHS, "batch_size": BATCH, "checkpoints": EPOCHS, "schedule": "linear", "workers": workers,
                  "turnover": {"after": ["act"], "before": ["head"]}},
    }  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    return read_state(folder / f"out/checkpoint-{LAST}")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(bool((one[name] - other[name]).norm() <= 1e-10 * other[name].norm()) for name in other)


def noted(folder: Path) -> dict[int, list[list[int]]]:
    """Return which examples every process had in each of its steps."""
    return {
        int(file.name): [[int(i) for i in line.split()] for line in file.read_text().splitlines()]
        for file in (folder / "notes").iterdir()
        if file.name.isdigit()
    }


@pytest.mark.parametrize("dies_at", [-1, 7])
def test_two_workers_train_the_model_of_one_even_if_one_is_killed(
    local_ray: None, tmp_path: Path, dies_at: int
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    train_model(make_config(config(alone, 1)), lambda _: None)
    said: list[str] = []
    train_model(make_config(config(together, 2, dies_at=dies_at)), said.append)
    assert [line.partition(":")[0] for line in said if line.startswith("checkpoint")] == [
        f"checkpoint-{step}" for step in range(3, LAST + 1, 3)
    ]
    assert same(weights(together), weights(alone))
    assert not list((together / "out").glob(".ray-train*"))
    reports = [json.loads((folder / "out/turnover_report.json").read_text()) for folder in (alone, together)]
    assert [point["step"] for point in reports[1]["curves"]] == [point["step"] for point in reports[0]["curves"]]
    assert reports[1]["curves"][-1]["own"] == pytest.approx(reports[0]["curves"][-1]["own"], rel=1e-9)
    steps = [len(one) for one in noted(together).values()]
    if dies_at < 0:
        assert sorted(steps) == [LAST, LAST]
    else:
        assert (together / "notes/dead").exists()
        assert len(steps) == 4, "all are started again"
        assert "a training worker was lost: all start again from the last checkpoint" in said
        assert [line for line in said if line.startswith("going on from checkpoint-")]


def test_a_mistake_of_one_worker_is_told_and_not_tried_again(local_ray: None, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="example 7 has no loss"):
        train_model(make_config(config(tmp_path, 2, fails_at=7)), lambda _: None)
    assert len(noted(tmp_path)) == 2
    assert time.monotonic() - began < 60
