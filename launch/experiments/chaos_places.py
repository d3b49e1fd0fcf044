"""Where chaos happens: a folder, a small disk, an S3 server behind a proxy, a cluster of nodes, two hosts."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster

from launch.experiments.chaos_trial import ENVIRONMENT, HEALTH, PATIENCE, Place, Skipped, Trial
from launch.experiments.s3_server import BUCKET, KEYS, S3Server
from launch.experiments.tcp_proxy import Fault, TcpProxy
from storage.locations import Location

DISK = 64 << 20  # bytes


@contextmanager
def in_folder(folder: Path) -> Iterator[Place]:
    """A folder; every driver starts a Ray of its own."""
    yield Place(Location.parse(str(folder / "run")))


@contextmanager
def on_a_head(folder: Path) -> Iterator[Place]:
    """A folder, and a Ray head that outlives the drivers."""
    with head_of(2) as cluster:
        yield at_head(cluster, Location.parse(str(folder / "run")))


@contextmanager
def head_of(workers: int, **environment: str) -> Iterator[Cluster]:
    """Give a cluster of one node, with room for so many workers."""
    with patch.dict(os.environ, ENVIRONMENT | environment):
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": workers, "include_dashboard": False, "_system_config": HEALTH},
        )
    try:
        yield cluster
    finally:
        cluster.shutdown()


def at_head(cluster: Cluster, run: Location, **more: Any) -> Place:
    """Return the place whose workers are on a cluster's head."""
    joined = {"backend": "ray", "workers": 2, "address": cluster.address}
    return Place(run, joined, roots=lambda: [raylet(cluster.head_node)], **more)


@contextmanager
def on_small_disk(folder: Path) -> Iterator[Place]:
    """A disk of its own, in memory. Skipped where that needs more rights."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        raise Skipped("mounting a small disk needs root")

    def fill(trial: Trial) -> bool:
        """Fill the disk, wait until the driver stops for it, and empty it."""
        filler, stops = disk / "filler", len(trial.stops)
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        full = not shutil.disk_usage(disk).free
        with suppress(psutil.TimeoutExpired):
            trial.driver.wait(PATIENCE)
        filler.unlink()
        return full and trial.goes_on() and len(trial.stops) > stops and os.strerror(errno.ENOSPC) in trial.said()

    try:
        with head_of(2) as cluster:
            yield at_head(cluster, Location.parse(str(disk / "run")), faults={"disk filled": fill})
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def on_s3(folder: Path) -> Iterator[Place]:
    """A real server; drivers and workers reach it through a proxy, the experiment itself does not."""
    data = folder / "server"
    data.mkdir()
    server = S3Server(data)

    def kill(trial: Trial) -> bool:
        """Kill the server; start it again over the same data once somebody missed it."""
        missed = proxy.refused
        server.kill()
        deadline = time.monotonic() + 10
        while proxy.refused == missed and time.monotonic() < deadline:
            time.sleep(0.05)
        server.start()
        return True

    def spoil(fault: Fault, trial: Trial) -> bool:
        before = proxy.spoiled
        proxy.spoil(fault)
        return trial.wait_for(lambda: proxy.spoiled > before, f"a request to spoil ({fault})")

    names: dict[Fault, str] = {
        "reset": "connection reset",
        "lost": "answer lost",
        "cut": "answer cut off",
        "busy": "answered 503",
    }
    faults: dict[str, Callable[[Trial], bool]] = {name: partial(spoil, fault) for fault, name in names.items()}
    with TcpProxy(server.ports["s3"]) as proxy, patch.dict(os.environ, access(server.endpoint)):
        through = access(f"http://127.0.0.1:{proxy.port}")
        try:
            server.start()
            with head_of(2, **through) as cluster:
                run = Location.parse(f"s3://{BUCKET}/run")
                yield at_head(cluster, run, environment=through, faults=faults | {"server killed": kill})
        finally:
            server.stop()


def access(endpoint: str) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", **KEYS}


@contextmanager
def on_nodes(folder: Path) -> Iterator[Place]:
    """A head without workers and two nodes of one worker each; a node that goes is followed by a new one."""
    with patch.dict(os.environ, ENVIRONMENT), head_of(0) as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=1)

        def alive() -> set[str]:
            return {entry["NodeID"] for entry in cluster.global_state.node_table() if entry["Alive"]}

        def pids() -> list[int]:
            return [raylet(node) for node in cluster.worker_nodes]

        def remove(trial: Trial) -> bool:
            node = chosen(trial)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            return True

        def hang(trial: Trial) -> bool:
            """Stop a node and all on it, put another in its place, and let it go on once it was given up."""
            node = chosen(trial)
            held = psutil.Process(raylet(node))
            frozen = [held, *held.children(recursive=True)]
            for process in frozen:
                process.suspend()
            cluster.add_node(num_cpus=1)
            noticed = trial.wait_for(lambda: node.node_id not in alive(), "the hung node to be given up")
            for process in frozen:
                with suppress(psutil.NoSuchProcess):
                    process.resume()
            psutil.wait_procs(frozen, timeout=20)  # a node that was given up ends by itself, late
            cluster.remove_node(node, allow_graceful=False)
            return noticed

        def chosen(trial: Trial) -> Node:
            trial.wait_for(trial.workers, "a worker")
            busy = [node for node in cluster.worker_nodes if psutil.Process(raylet(node)).children()]
            return trial.random.choice(sorted(busy or cluster.worker_nodes, key=raylet))

        yield Place(
            Location.parse(str(folder / "run")),
            cluster={"backend": "ray", "workers": 2, "address": cluster.address},
            roots=pids,
            faults={"node removed": remove, "node hung": hang},
        )


def raylet(node: Node) -> int:
    """Return the process of a node's daemon, whose children its workers are."""
    return int(node.all_processes["raylet"][0].process.pid)
