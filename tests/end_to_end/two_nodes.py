"""Run FOLDER/job.yaml on two Ray nodes, ask both what they see, write what came of it to FOLDER/result.json."""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from actors.cluster import connect, nodes_that_cannot_read
from launch import paths
from launch.config import load_config
from launch.job import score
from launch.sources import model_spec
from storage.locations import Location


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    config = load_config(str(folder / "job.yaml"), [f"cluster.address={cluster.address}"])
    score(config, lambda _: None)
    assert connect(cluster.address)

    def only_on_the_first(path: str) -> bool:
        return str(ray.get_runtime_context().get_node_id()) != second_id

    second_id = second.node_id
    here = [str(folder)]
    blind = nodes_that_cannot_read(here, only_on_the_first)
    result = {"shared": nodes_that_cannot_read(here), "blind": blind, "second": second_id, "refused": ""}
    paths.nodes_that_cannot_read = lambda seen: nodes_that_cannot_read(seen, only_on_the_first)
    try:
        paths.refuse_unseen_paths(Location.parse(config.run.uri), [model_spec(config, lambda _: None)[0]])
    except ValueError as error:
        result["refused"] = str(error)
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
