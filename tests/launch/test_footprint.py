"""Predicted bytes against what a job really left, to the byte."""

from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from launch import footprint
from launch.config import make_config
from launch.footprint import Size, gradient_bytes, safetensors_bytes, score_bytes, state_bytes
from launch.job import score
from storage.gradients import GradientStore
from storage.locations import Location
from tests.end_to_end.conftest import QUERIES, ROWS, Settings

TINY = Size(rows=ROWS, tokens=0, queries=QUERIES, checkpoints=3, shard_rows=16)


def left(run: Location, folder: str, suffix: str = "") -> int:
    return sum(run.size(key) for key in run.list(folder) if key.endswith(suffix))


@pytest.mark.parametrize(
    "gradients",
    [
        {},
        {"dtype": "float32", "norms": True, "shard_rows": 7},
        {"dtype": "bfloat16", "norms": False},
        {"projection": "none", "modules": ["classifier*"], "dtype": "float32"},
        {"projection": "rademacher", "dim": 300},
    ],
    ids=["default", "float32", "bfloat16 without norms", "unprojected", "dense"],
)
def test_bytes_are_exact(settings: Settings, gradients: dict[str, Any]) -> None:
    config = make_config(settings(gradients=gradients, method={"name": "gradient-dot"}))
    score(config, lambda _: None)
    run = Location(config.run.uri)
    store = GradientStore.open(run).settings
    size = Size(ROWS, 0, QUERIES, 3, gradients.get("shard_rows", 16))
    assert gradient_bytes(store, size) == left(run, "gradients") - run.size("gradients/store.json")
    one = Size(ROWS, 0, QUERIES, 1, size.shard_rows)  # gradient-dot takes one checkpoint
    if store.norms:
        assert state_bytes(store.arrays, len(store.modules), one) == left(run, "states", ".safetensors")
    assert score_bytes(one, 50, dense=True) == left(run, "scores/scores/shards")


def test_a_long_corpus_has_several_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "SEGMENT_ROWS", 20)
    assert TINY.segments == [20, 20, 5]
    assert TINY.shards == [16, 4, 16, 4, 5]


@pytest.mark.parametrize("seed", range(5))
def test_safetensors_bytes_equal_the_file(seed: int) -> None:
    draw = np.random.default_rng(seed)
    kinds = {"F64": np.float64, "I64": np.int64, "F32": np.float32, "U8": np.uint8}
    shapes = {
        f"arrays/{'x' * int(draw.integers(1, 30))}{n}": (
            str(draw.choice(list(kinds))),
            tuple(int(d) for d in draw.integers(1, 40, int(draw.integers(0, 3)))),
        )
        for n in range(6)
    }
    data = safetensors.numpy.save({name: np.zeros(shape, kinds[kind]) for name, (kind, shape) in shapes.items()})
    assert safetensors_bytes(shapes) == len(data)
