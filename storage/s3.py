"""S3 through obstore: connections, and the handful of operations that `locations` is built on.

Credentials, region and endpoint are those that boto3 finds, so AWS_ENDPOINT_URL, profiles and instance roles work.
Every address is s3://bucket/key. Errors of the client become OSErrors that name the address.
"""

import errno
import functools
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

import boto3
import obstore
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_AHEAD = 1 << 20  # bytes asked for at least per request
WAITS = (0.1, 0.4, 1.6, 6.4)  # seconds before a create-only put, a delete or a listing is tried again
Found = TypeVar("Found")
ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


def get(address: str) -> bytes:
    """Return all bytes of an object. FileNotFoundError names it."""
    store, key = _open(address)
    with _named(address):
        return bytes(obstore.get(store, key).bytes())


def size(address: str) -> int | None:
    """Return an object's length in bytes, None if there is no such object."""
    store, key = _open(address)
    if not key:
        return None
    try:
        with _named(address):
            return obstore.head(store, key)["size"]
    except FileNotFoundError:
        return None


def create(address: str, data: bytes) -> bool:
    """Create an object; False if one is already there (perhaps ours, when a response was lost)."""
    store, key = _open(address)
    try:
        with _named(address):
            _again(lambda: obstore.put(store, key, data, mode="create", use_multipart=False))
    except FileExistsError:
        return False
    return True


def replace(address: str, data: bytes) -> None:
    """Put an object over whatever is there."""
    store, key = _open(address)
    with _named(address):
        obstore.put(store, key, data, use_multipart=False)


def upload(address: str, path: Path) -> bool:
    """Put a local file, in parts if it is large. Always True: parts cannot be create-only."""
    store, key = _open(address)
    with _named(address):
        obstore.put(store, key, path)
    return True


def delete(address: str) -> None:
    """Remove an object; one that is not there is fine."""
    store, key = _open(address)
    with _named(address):
        _again(lambda: obstore.delete(store, key))


def staging_folder(address: str) -> None:
    """Return the folder in which a file is written before its upload: None, the system's own."""


def list_keys(address: str) -> list[str]:
    """Return the keys of everything below an address, relative to it."""
    return [key for key, _, _ in list_versions(address)]


def list_versions(address: str) -> list[tuple[str, int, str]]:
    """Return (key relative to the address, size in bytes, entity tag) of everything below, sorted by key."""
    store, prefix = _open(address)
    lead = f"{prefix}/" if prefix else ""
    with _named(address):
        batches = _again(lambda: list(obstore.list(store, prefix=lead or None, chunk_size=1000)))
    entries = [entry for batch in batches for entry in batch]
    return sorted((entry["path"].removeprefix(lead), entry["size"], entry["e_tag"] or "") for entry in entries)


def open_reader(address: str) -> BinaryIO:
    """Return a seekable binary file that reads ranges of an object. FileNotFoundError names it."""
    length = size(address)
    if length is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", address)
    return cast(BinaryIO, io.BufferedReader(_Ranges(address, length), READ_AHEAD))


class _Ranges(io.RawIOBase):
    def __init__(self, address: str, length: int) -> None:
        self.address, self.length, self.position = address, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to byte {start + offset} of {self.length}", self.address)
        self.position = start + offset
        return self.position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self.position + len(view), self.length)
        if stop <= self.position:
            return 0
        store, key = _open(self.address)
        with _named(self.address):
            data = bytes(obstore.get_range(store, key, start=self.position, end=stop))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def _open(address: str) -> tuple[S3Store, str]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return _store(bucket, tuple(os.environ.get(name) for name in ENVIRONMENT)), key


@functools.lru_cache(maxsize=16)
def _store(bucket: str, environment: tuple[str | None, ...]) -> S3Store:
    """Return this process's connection to a bucket; `environment` is there so that a changed one gets a new one."""
    session = boto3.Session()
    if session.get_credentials() is None:
        raise PermissionError(
            f"s3://{bucket}: no AWS credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        )
    region = session.region_name or "us-east-1"
    endpoint = session.client("s3", region_name=region).meta.endpoint_url
    return S3Store(
        bucket,
        region=region,
        endpoint=None if endpoint.endswith(".amazonaws.com") else endpoint,
        virtual_hosted_style_request=endpoint.endswith(".amazonaws.com"),
        credential_provider=Boto3CredentialProvider(session),
        client_options={"allow_http": endpoint.startswith("http://")},
        retry_config={"max_retries": 10, "retry_timeout": timedelta(minutes=3)},
    )


def _again(operation: Callable[[], Found]) -> Found:
    """Return the result of an operation that may be done twice, done again after WAITS if its connection breaks.

    obstore itself tries again what HTTP calls idempotent, so neither a create-only put nor a delete, nor a listing that is
    cut off. A put that then finds its own object says so, as one that finds another's does, and their bytes are compared.
    """
    for wait in WAITS:
        try:
            return operation()
        except GenericError:
            time.sleep(wait)
    return operation()


@contextmanager
def _named(address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object or bucket", address) from error
    except AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, "already there", address) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, f"refused by the server: {_first_line(error)}", address) from error
    except BaseError as error:
        raise OSError(errno.EIO, _first_line(error), address) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
