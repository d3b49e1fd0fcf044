"""The same application as a Ray Serve deployment: replicas that each read the runs themselves."""

import signal
import threading

from fastapi import FastAPI
from ray import serve

from actors.cluster import connect
from launch.service.app import Settings, create_app

NAME = "influence"
AT_ONCE = 64  # requests in flight a replica


def deployment(settings: Settings, replicas: int) -> serve.Application:
    """Return the deployment; a replica that is lost is started again, and loses only what it was answering."""

    def build() -> FastAPI:
        return create_app(settings)

    replica = serve.deployment(
        name=NAME, num_replicas=replicas, max_ongoing_requests=AT_ONCE, ray_actor_options={"num_cpus": 1},
        health_check_period_s=5, health_check_timeout_s=10,
    )  # fmt: skip
    return replica(serve.ingress(build)()).bind()


def start_on_ray(settings: Settings, host: str, port: int, replicas: int) -> None:
    """Serve from a Ray cluster: the one this process is in, else a local one."""
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment(settings, replicas), name=NAME, route_prefix="/")


def serve_on_ray(settings: Settings, host: str, port: int, replicas: int) -> None:
    """Serve from a Ray cluster until interrupted."""
    connect("auto")
    try:
        start_on_ray(settings, host, port, replicas)
        print(f"serving {', '.join(settings.runs)} at http://{host}:{port}/v1/runs, {replicas} replicas")
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        stopped.wait()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
