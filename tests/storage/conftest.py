"""Places to store things: a folder, and an S3 bucket of a server inside this process."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from launch.experiments.s3_server import KEYS, s3_server
from storage.locations import Location

BUCKETS = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    pytest.importorskip("flask", reason="moto's server needs flask: install moto[server]")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def real_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real server, for tests marked `cluster`."""
    with s3_server(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket that the environment leads to."""
    return new_bucket(s3_endpoint, monkeypatch)


@pytest.fixture
def real_bucket(real_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same of a real server."""
    return new_bucket(real_endpoint, monkeypatch)


def new_bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", **KEYS}.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(BUCKETS)}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return name


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location.parse(str(tmp_path / "run"))


@pytest.fixture(params=["folder", "s3", pytest.param("server", marks=pytest.mark.cluster)])
def place(request: pytest.FixtureRequest) -> Location:
    """The same contract on every kind of storage: a folder, S3 in this process, a real S3 server."""
    if request.param == "folder":
        return request.getfixturevalue("run")
    name = request.getfixturevalue({"s3": "bucket", "server": "real_bucket"}[request.param])
    return Location.parse(f"s3://{name}/some/run")
