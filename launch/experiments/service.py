"""service: how fast stored scores are read and new text is answered, and what a killed replica costs.

`reads`: one service process on one core over an index of 1,000 queries × 100 neighbours and a million examples. An open
loop sends a constant number of requests a second, by turns for random queries' influences and for a trivial route; each is
timed from the moment it was due, so that a stall counts for every request it delays. Then as many connections as are
useful ask as fast as they are answered. `attribute`: POST attribute with the models loaded, one after another. `replica`:
one of two Ray Serve replicas is killed under an open loop; what fails must have been in flight.
"""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import uvicorn

from engine.metrics import bootstrap_interval
from launch.config import load_config
from launch.experiments.registry import Experiment, Gate
from launch.experiments.service_run import LABEL, large_run, small_run
from launch.job import score
from launch.service.app import Settings, create_app

P99_MS, OVER_TRIVIAL, P50_ATTRIBUTE_MS = 20.0, 4.0, 150.0
PATIENCE = 120.0  # seconds until a service must have started
REPLICA = "ServeReplica"  # in the name of the process of a replica


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["cells"])


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    return {"reads": reads, "attribute": attribute, "replica": replica}[cell](config)


def reads(config: dict[str, Any]) -> dict[str, Any]:
    """Return milliseconds of each request by route, requests/s at saturation, and the service's memory at the end."""
    size = config["index"]
    with tempfile.TemporaryDirectory(prefix="influence-service-") as folder:
        run = large_run(Path(folder, "large"), size["examples"], size["queries"], size["k"])
        with service_for(config, run) as (url, process), on_cores(config["cores"][1:]):
            return asyncio.run(read_rounds(url, config, process))


@contextmanager
def service_for(config: dict[str, Any], run: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Give a service in a process and on a core of its own; at toy size in a thread of this process."""
    if config["own_process"]:
        with serving(run, core=config["cores"][0]) as service:
            yield service
        return
    server = uvicorn.Server(uvicorn.Config(create_app(Settings([str(run)])), port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.config.port}", psutil.Process()
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    """Keep this process to the given cores, if any."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def read_rounds(url: str, config: dict[str, Any], process: psutil.Process) -> dict[str, Any]:
    """Warm up, then time both routes by turns, then saturate; memory is that of the warm service, before and after."""
    draw = np.random.default_rng(0)
    size = config["index"]
    paths = [
        f"/v1/runs/large/queries/{query}/influences?scores={LABEL}&k={size['k']}"
        for query in draw.integers(size["queries"], size=10_000)
    ]
    routes = {"influences": paths, "trivial": ["/healthz"]}
    times: dict[str, list[list[float]]] = {name: [] for name in routes}
    async with connected(url) as client:
        await closed_loop(client, paths, config["connections"], min(3.0, config["seconds"]))  # tables open, threads run
        memory = [process.memory_info().rss]
        for _ in range(config["rounds"]):
            for name, asked in routes.items():
                done = await open_loop(client, asked, config["rate"], config["seconds"])
                times[name].append([one["ms"] for one in done if one["ok"]])
                assert all(one["ok"] for one in done), f"{name}: {sum(not one['ok'] for one in done)} requests failed"
        saturated = await closed_loop(client, paths, config["connections"], config["seconds"])
        assert all(one["ok"] for one in saturated), "requests failed at saturation"
        memory.append(process.memory_info().rss)
    rounded = {name: [[round(ms, 2) for ms in one] for one in rounds] for name, rounds in times.items()}
    return {
        "ms": rounded,
        "saturation": len(saturated) / config["seconds"],
        "memory_mib": [round(one / 2**20) for one in memory],
    }


async def open_loop(client: httpx2.AsyncClient, paths: list[str], rate: float, seconds: float) -> list[dict[str, Any]]:
    """Send requests at a constant rate whatever happens to them, and return each as `ask` does."""
    start = time.perf_counter()

    async def one(number: int) -> dict[str, Any]:
        due = start + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await ask(client, paths[number % len(paths)], due)

    return list(await asyncio.gather(*(one(number) for number in range(int(rate * seconds)))))


async def closed_loop(
    client: httpx2.AsyncClient, paths: list[str], connections: int, seconds: float
) -> list[dict[str, Any]]:
    """Keep so many requests under way, each followed at once by another, and return each as `ask` does."""
    end = time.perf_counter() + seconds

    async def one(first: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        numbers = itertools.count(first, connections)
        while time.perf_counter() < end:
            number = next(numbers)
            found.append(await ask(client, paths[number % len(paths)], time.perf_counter()))
        return found

    return [each for several in await asyncio.gather(*map(one, range(connections))) for each in several]


async def ask(client: httpx2.AsyncClient, path: str, due: float) -> dict[str, Any]:
    """Return when a request was sent and done, the milliseconds since it was due, and whether it was answered."""
    sent = time.perf_counter()
    try:
        ok = (await client.get(path)).is_success
    except httpx2.HTTPError:
        ok = False
    done = time.perf_counter()
    return {"sent": sent, "done": done, "ms": 1e3 * (done - due), "ok": ok}


def attribute(config: dict[str, Any]) -> dict[str, Any]:
    """Return milliseconds of POST attribute, one new text each, after the first has loaded the models."""
    with tempfile.TemporaryDirectory(prefix="influence-service-") as folder:
        run = attributed_run(config, Path(folder))
        with service_for(config, run) as (url, _), httpx2.Client(base_url=url, timeout=PATIENCE) as client:
            times = []
            name = client.get("/v1/runs").json()["runs"][0]["name"]
            for number in range(config["questions"] + 1):
                body = {"texts": [f"a film that is number {number} of many, and not the worst"]}
                began = time.perf_counter()
                client.post(f"/v1/runs/{name}/attribute?scores={config['label']}", json=body).raise_for_status()
                times.append(1e3 * (time.perf_counter() - began))
    return {"first_ms": times[0], "ms": times[1:]}


def attributed_run(config: dict[str, Any], folder: Path) -> Path:
    """Return the run that new text is asked of: the demo's, scored here from its model, or at toy size a small one."""
    if "small" in config:
        return small_run(config["small"])
    settings = load_config(config["demo"], [f"run.uri={folder / 'demo'}", f"output.label={config['label']}"])
    if not Path(settings.corpus.path).exists():
        raise ValueError(
            f"{settings.corpus.path} is missing, the demo's corpus and model are used: run make demo first"
        )
    score(settings, lambda _: None)
    return folder / "demo"


def replica(config: dict[str, Any]) -> dict[str, Any]:
    """Kill one of two replicas under load, `kills` times; return what was in flight, and what failed, each time."""
    with serving(small_run(config["replica_run"]), "--ray", "--replicas", "2") as (url, _):
        return {"kills": [asyncio.run(kill_one(url, config)) for _ in range(config["kills"])]}


async def kill_one(url: str, config: dict[str, Any]) -> dict[str, Any]:
    """Kill a replica while so many connections ask without a pause; wait for two replicas first."""
    victim = replicas(2)[0]
    paths = ["/v1/runs/reviews/queries/0/influences?scores=online"]
    async with connected(url) as client:
        load = asyncio.create_task(closed_loop(client, paths, config["connections"], 2 * config["seconds"]))
        await asyncio.sleep(config["seconds"])
        killed = time.perf_counter()
        victim.kill()
        done = await load
    flying = [one for one in done if one["sent"] <= killed < one["done"]]
    failed = [one for one in done if not one["ok"]]
    beyond = [one for one in failed if one not in flying]
    return {"requests": len(done), "in_flight": len(flying), "failed": len(failed), "beyond": len(beyond)}


def replicas(count: int) -> list[psutil.Process]:
    """Return the replicas' processes, once there are so many."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = [p for p in psutil.process_iter(["cmdline"]) if REPLICA in " ".join(p.info["cmdline"] or [])]
        if len(found) == count:
            return found
        time.sleep(0.5)
    raise ValueError(f"{len(found)} replicas are there, {count} are needed")


@contextmanager
def serving(run: Path, *arguments: str, core: int | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """Start a service over a run, on one core if it is given, and wait until it answers."""
    port = free_port()
    command = [sys.executable, "launch/serve.py", str(run), "--port", str(port), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    if core is not None:
        process.cpu_affinity([core])
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"the service did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield url, process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/v1/runs", timeout=PATIENCE).is_success
    except httpx2.TransportError:
        return False


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx2.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
        yield client


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    found = []
    if "reads" in done:
        found += read_gates(done["reads"])
    if "attribute" in done:
        times = np.array(done["attribute"]["ms"])
        interval = bootstrap_interval(times, statistic=np.median)
        found.append(Gate("attribute p50 ms", float(np.median(times)), interval, P50_ATTRIBUTE_MS, at_least=False))
        found.append(Gate("attribute first ms (loads the models)", done["attribute"]["first_ms"]))
    if "replica" in done:
        kills = done["replica"]["kills"]
        for what, key in (("kills", None), ("requests in flight", "in_flight"), ("failed", "failed")):
            found.append(Gate(f"replica killed: {what}", sum(one[key] if key else 1 for one in kills)))
        beyond = sum(one["beyond"] for one in kills)
        found.append(Gate("replica killed: failed, not in flight", beyond, threshold=0, at_least=False))
    return found


def read_gates(result: dict[str, Any]) -> list[Gate]:
    """Return p99 of both routes, the condition on them (either bound suffices), saturation and memory."""
    rounds = {name: np.array([np.percentile(one, 99) for one in several]) for name, several in result["ms"].items()}
    ratios = rounds["influences"] / rounds["trivial"]
    p99, over = float(np.median(rounds["influences"])), float(np.median(ratios))
    asked = Gate("p99 ms", p99, bootstrap_interval(rounds["influences"], statistic=np.median), P99_MS, at_least=False)
    if p99 > P99_MS:
        interval = bootstrap_interval(ratios, statistic=np.median)
        asked = Gate("p99 over trivial", over, interval, OVER_TRIVIAL, at_least=False)
    before, after = result["memory_mib"]
    return [
        asked,
        Gate("p99 ms of influences (median of rounds)", p99),
        Gate("p99 ms of the trivial route", float(np.median(rounds["trivial"]))),
        Gate("p99 over trivial (median of rounds)", over),
        Gate("p50 ms", float(np.median(np.concatenate(result["ms"]["influences"])))),
        Gate("saturation, requests/s", result["saturation"]),
        Gate("memory of the service MiB", after),
        Gate("memory grown MiB", after - before),
    ]


EXPERIMENT = Experiment(
    "service", "stored scores are read within milliseconds, new text within 150, and a killed replica costs what it held",
    15, cells, run_cell, gates,
)  # fmt: skip
