"""A real S3 server for tests: SeaweedFS from PyPI, in a folder of its own, on ports of its own."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

KEYS = {"AWS_ACCESS_KEY_ID": "influence", "AWS_SECRET_ACCESS_KEY": "influence-secret"}
SERVICES = ("s3", "master", "volume", "filer", "admin")
BUCKET = "first"


def free_ports(count: int) -> list[int]:
    """Return ports that are free, as are those 10,000 above, which the server takes for its own talk."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 9_000, 50_000):
        if all(_is_free(one) for one in (port, port + 10_000)):
            found.append(port)
            if len(found) == count:
                return found
    raise OSError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run the server and give its endpoint once an object can be put; credentials are KEYS."""
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
    command = [
        weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
        *(f"-{service}.port={port}" for service, port in ports.items()),
        f"-bucket={BUCKET}", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | KEYS, stdout=log, stderr=log, cwd=folder)
        try:
            endpoint = f"http://127.0.0.1:{ports['s3']}"
            _wait(endpoint, process)
            yield endpoint
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(endpoint: str, process: subprocess.Popen) -> None:
    keys = {name.lower(): value for name, value in KEYS.items()}
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", config=Config(retries={"max_attempts": 1}), **keys
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
            return
        except (BotoCoreError, ClientError):
            assert process.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.2)
