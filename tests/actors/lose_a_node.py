"""Run a toy stage on two Ray nodes, take one away in mid-unit, write what came of it to FOLDER/result.json."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import toy_workers
from ray import cloudpickle
from ray.cluster_utils import Cluster

from actors.ray_pool import RayPool
from actors.run_stage import run_stage


class Sink:
    def __init__(self) -> None:
        self.lost: list[bool] = []

    def write(self, kind: str, **fields: Any) -> None:
        if kind == "lost":
            self.lost.append(fields["with_node"])


def main(folder: Path) -> None:
    cloudpickle.register_pickle_by_value(toy_workers)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    stage = toy_workers.toy_stage("nap", folder)
    for unit in stage.units[:2]:
        unit.payload["seconds"] = 5
    for unit in stage.units[2:]:
        unit.payload["seconds"] = 0
    journal, sink = toy_workers.MemoryJournal(), Sink()
    with RayPool(toy_workers.ToyWorker, 2) as pool:
        while len(pool.workers) < 2:
            pool.wait(0.5)

        def take_away() -> None:
            while not all((folder / f"u{n}.begun").exists() for n in range(2)):
                time.sleep(0.05)
            nodes.remove_node(second, allow_graceful=False)

        threading.Thread(target=take_away).start()
        report = run_stage(pool, stage, journal, events=sink)
    assert report.retries >= 1
    (folder / "result.json").write_text(json.dumps({"committed": len(journal.records), "lost_with_node": sink.lost}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
