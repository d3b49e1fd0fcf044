"""Connecting to Ray (a cluster when there is one, else a local start), and how many workers of which kind fit."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Device = Literal["auto", "cpu", "cuda"]


Workers = Literal["auto"] | int | Mapping[Literal["min", "max"], int]  # auto, so many, or from `min` to `max`


@dataclass(frozen=True)
class WorkerPlan:
    count: int  # without which a job does not go on
    cpus: float  # per worker
    gpus: float  # per worker
    most: int  # as many as this are taken where the cluster has or gets room for them


def connect(
    address: str = "auto",  # "auto": RAY_ADDRESS if set, else local; "local"; or an address as ray.init takes it
    num_cpus: int | None = None,  # CPUs of a local start; None: all cores
    log_to_driver: bool = False,  # print what workers print
) -> bool:  # whether an existing cluster was joined
    """Connect this process to Ray once; a second call changes nothing.

    Inside a Ray job RAY_ADDRESS is set by Ray. A local start has no dashboard, sends no usage statistics and, unless
    RAY_AUTH_MODE is set, uses no token: left alone, Ray would write one that later clusters of this user then demand.
    """
    joins = address not in ("auto", "local") or (address == "auto" and bool(os.environ.get("RAY_ADDRESS")))
    if ray.is_initialized():
        return joins
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": log_to_driver}
    with own_sigterm():
        if joins:
            ray.init(address=address, **quiet)
            return True
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    return False


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Put this process's own handler of SIGTERM back, if it had one: Ray's writes a page of C++ stack and exits."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def nodes() -> list[str]:
    """Return the ids of the nodes that are alive."""
    return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])


def nodes_that_cannot_read(
    paths: list[str],
    exists: Callable[[str], bool] = os.path.exists,  # carried to every node by value; an argument for tests
    timeout: float = 60.0,  # seconds a node has to answer
) -> list[str]:
    """Return the nodes on which one of these local paths does not exist, asking each one that is alive.

    A node is called by host name, address and the start of its id: several may share the first two. One that gives no
    answer cannot be worked on, so it is named too; one that died meanwhile is not.
    """

    def sees() -> bool:
        return all(exists(path) for path in paths)

    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(sees).remote()] = node
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
    alive = set(nodes())
    blind = {node_name(asked[answer]) for answer in answered if asked[answer]["NodeID"] in alive and not _get(answer)}
    return sorted(blind | {f"{node_name(asked[answer])} (no answer in {timeout:.0f} s)" for answer in silent})


def node_name(node: Mapping[str, Any]) -> str:  # as ray.nodes() describes it
    """Return what tells a node from every other: `gpu-3 (10.0.0.7, 5f3a09c1)`."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _get(answer: Any) -> bool:
    """Return a node's answer; an answer that was lost on the way says no."""
    try:
        return bool(ray.get(answer))
    except RayError:
        return False


def resources() -> dict[str, float]:
    """Return the cluster's CPUs and GPUs."""
    total = ray.cluster_resources()
    return {name: total.get(name, 0.0) for name in ("CPU", "GPU")}


def worker_plan(
    workers: Workers,
    device: Device,
    available: Mapping[str, float],  # what resources() returned
) -> WorkerPlan:
    """Return the workers to start: one a GPU where there are any (or asked for), else one a CPU core.

    A number is taken as it is, and a worker that stays pending is named by the pool. With `min` and `max` the cluster may
    have less now than later: workers beyond its room stay pending, which is what an autoscaler goes by. ValueError: a
    device that the cluster does not have, and may not get.
    """
    cpus, gpus = int(available.get("CPU", 0)), int(available.get("GPU", 0))
    elastic = isinstance(workers, Mapping)
    if device == "cuda" and not gpus and not elastic:
        raise ValueError(
            "cluster.device=cuda is not allowed: the cluster has no GPU. Use cpu or auto, add a GPU node, or give "
            "cluster.workers as {min, max} where nodes come later."
        )
    if isinstance(workers, int) and workers < 1:
        raise ValueError(f"cluster.workers={workers} is not allowed: must be auto or at least 1.")
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    if isinstance(workers, Mapping):
        least, most = workers["min"], workers["max"]
    else:
        least = most = max(1, gpus if on_gpu else cpus) if workers == "auto" else int(workers)
    return WorkerPlan(least, cpus=1.0, gpus=1.0 if on_gpu else 0.0, most=most)
