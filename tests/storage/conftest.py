"""Places to store things: a folder, and an S3 bucket of a server inside this process."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

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


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket that the environment leads to."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    settings = {"ENDPOINT_URL": s3_endpoint, "ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "mine", "REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"bucket-{next(BUCKETS)}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return name


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location.parse(str(tmp_path / "run"))


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest) -> Location:
    """The same contract on both kinds of storage."""
    if request.param == "folder":
        return request.getfixturevalue("run")
    return Location.parse(f"s3://{request.getfixturevalue('bucket')}/some/run")
