"""Run jobs on a Ray cluster that gets its nodes one after the other, in a process of its own: it is connected to one only.

on_nodes.py FOLDER jobs    FOLDER/jobs.json: [{"nodes": 1, "config": {…}}, …], their numbers of nodes ascending
on_nodes.py FOLDER grow    FOLDER/grow.json: a config whose first worker comes to a gate, where it waits for a second node
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray.cluster_utils import Cluster

from actors.cluster import connect
from launch.config import make_config
from launch.job import score
from tests.end_to_end.drivers import holder, let_go, wait_until
from tests.end_to_end.gated import tally


def jobs(folder: Path, cluster: Cluster) -> None:
    nodes = 1
    for job in json.loads((folder / "jobs.json").read_text()):
        while nodes < job["nodes"]:
            cluster.add_node(num_cpus=1)
            nodes += 1
        cluster.wait_for_nodes()
        config = job["config"]
        config["cluster"] |= {"address": cluster.address}
        score(make_config(config), lambda _: None)


def grow(folder: Path, cluster: Cluster) -> None:
    config = json.loads((folder / "grow.json").read_text())
    gate = Path(config["task"]["settings"]["gate"])
    config["cluster"] |= {"address": cluster.address}
    connect(cluster.address)  # here, as nodes are added: both set up signals, which only a main thread may
    with ThreadPoolExecutor() as driver:
        scored = driver.submit(score, make_config(config), lambda _: None)
        first = holder(gate)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: {pid for pid, *_ in tally(gate)} - {first}, "work of a worker on the second node", 150)
        let_go(gate)
        scored.result()


if __name__ == "__main__":
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    {"jobs": jobs, "grow": grow}[sys.argv[2]](Path(sys.argv[1]), one)
