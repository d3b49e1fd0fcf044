"""What a Prometheus server would read of a stage on Ray."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest
from toy_workers import MemoryJournal, ToyWorker, toy_stage

from actors.metrics import JobMetrics
from actors.ray_pool import RayPool
from actors.run_stage import run_stage
from actors.units import Receipt

pytestmark = pytest.mark.cluster
WAIT = 60.0  # seconds; a worker's figures reach the node's exporter every ten


def exported(label: str) -> dict[str, float]:
    """Return our metrics of a run from every node's exporter, by name."""
    import ray

    text = ""
    for node in ray.nodes():
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as reply:
            text += reply.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_influence") and f'run="{label}"' in line]
    return {re.split(r"[{ ]", line)[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_units_rows_and_bytes_are_exported(local_ray: None, tmp_path: Path) -> None:
    stage, label = toy_stage("double", tmp_path, units=6), f"s3://bucket/{tmp_path.name}"
    metrics = JobMetrics(label)
    with RayPool(ToyWorker, 2) as pool:
        run_stage(pool, stage, MemoryJournal(), take=lambda receipt: metrics.count("collect-train", receipt))
        metrics.count("collect-train", Receipt("bad", quarantined={3: "the loss"}))
        metrics.state("collect-train", 6, 6, 2)
        deadline = time.monotonic() + WAIT
        while len(found := exported(label)) < 8:
            assert time.monotonic() < deadline, found
            time.sleep(1)
    assert found == {
        "ray_influence_units": 6, "ray_influence_units_done": 6, "ray_influence_workers": 2,
        "ray_influence_done_total": 7, "ray_influence_rows_total": 60, "ray_influence_tokens_total": 180,
        "ray_influence_bytes_total": 2400, "ray_influence_quarantined_total": 1,
    }  # fmt: skip
