"""Serve runs over HTTP: an API for other services and a page for people.

    python launch/serve.py RUN… [--host --port --workers --tokens FILE]     http://127.0.0.1:8000
    python launch/serve.py RUN… --ray [--replicas N]                        the API as a Ray Serve deployment
    python launch/serve.py token FILE --name NAME [--role read|admin]       add a token to FILE and print it, once

A run may be empty, in the middle of its job or finished. The page needs a single process: with several workers, or on
Ray Serve, the API is served alone.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn

from launch.command import find_modules_here, run_command
from launch.messages import plain_errors
from launch.service.app import Settings, create_app, from_environment, to_environment
from launch.service.auth import add_token
from launch.service.guard import LOOPBACK
from launch.service.metrics import SHARED

KEEP_ALIVE = 30  # seconds that an idle connection stays open
CONNECTIONS = 256  # requests at once, beyond which 503 is answered


def settings_of(runs: list[str], host: str, tokens: str | None, hosts: list[str], page: bool) -> Settings:
    """Return the settings of a service. ValueError for an open port without tokens.

    Without tokens only loopback names are answered, so that no other site can reach it through a browser.
    """
    if host not in LOOPBACK and tokens is None:
        raise ValueError(
            f"--host {host} is open to others: give --tokens FILE (made by `serve.py token FILE --name …`)"
        )
    if not runs:
        raise ValueError("RUN is missing: name one folder or s3://bucket/prefix, or several")
    names = (*LOOPBACK, *hosts) if hosts or tokens is None else ()
    return Settings(runs, str(Path(tokens).absolute()) if tokens else None, names, page)


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve until interrupted. Texts of questions and tokens are never logged: there is no access log, but /metrics."""
    to_environment(settings)
    options: dict[str, Any] = {
        "host": host, "port": port, "access_log": False, "server_header": False, "timeout_keep_alive": KEEP_ALIVE,
        "limit_concurrency": CONNECTIONS, "log_level": "warning",
    }  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(settings.runs)} at http://{shown}:{port}" + ("/page" if settings.page else "/v1/runs"))
    if workers == 1:
        uvicorn.run(create_app(settings), **options)
        return
    with tempfile.TemporaryDirectory(prefix="influence-metrics-") as folder:
        os.environ[SHARED] = folder
        uvicorn.run(
            f"{from_environment.__module__}:{from_environment.__name__}", factory=True, workers=workers, **options
        )


def main(
    runs: Annotated[list[str], typer.Argument(help="folders or s3://bucket/prefix of runs")],
    host: Annotated[str, typer.Option(help="address to listen on; others than loopback need --tokens")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="processes; the page needs 1")] = 1,
    tokens: Annotated[str | None, typer.Option(help="file of token hashes, made by `serve.py token`")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="another host name it is reached by")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="serve the API with Ray Serve")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="of the Ray Serve deployment")] = 2,
) -> None:
    """Serve the runs."""
    find_modules_here()
    with plain_errors():
        settings = settings_of(runs, host, tokens, allow_host or [], page=workers == 1 and not ray)
        if ray:
            from launch.service.on_ray import serve_on_ray  # ray is slow to import, and only needed here

            serve_on_ray(settings, host, port, replicas)
        else:
            serve(settings, host, port, workers)


def token(
    file: Annotated[Path, typer.Argument(help="file of token hashes; made if need be")],
    name: Annotated[str, typer.Option(help="whose it is")],
    role: Annotated[str, typer.Option(help="read, or admin, which may also start jobs")] = "read",
) -> None:
    """Add a token and print it: only its salted hash is kept. To take it back, remove its entry from the file."""
    with plain_errors():
        print(add_token(file, name, role))


if __name__ == "__main__":
    if sys.argv[1:2] == ["token"]:
        sys.argv.pop(1)
        run_command(token)
    else:
        run_command(main)
