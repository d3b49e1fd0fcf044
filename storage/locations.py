"""Where bytes live: a folder, an S3 prefix or a folder inside an installed package, all behind one small class.

Owns addresses, create-only puts, JSON objects and records of objects. The operations themselves are in `local` and `s3`;
what the bytes mean is left to the other modules. A key is a path below the location, with forward slashes; the key ""
is the location itself.
"""

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO
from urllib.parse import unquote, urlsplit

from storage import local, s3

MD5 = re.compile(r"[0-9a-f]{32}")  # an entity tag that is one: of an object put in one part, not encrypted with KMS


class ObjectConflict(OSError):  # noqa: N818
    """Another writer has already created this object with different bytes."""


@dataclass(frozen=True)
class ObjectRecord:
    """One object as a done-record names it; `key` is relative to the run, `sha256` in hexadecimal."""

    key: str
    size: int
    sha256: str

    @classmethod
    def of(cls, key: str, data: bytes) -> "ObjectRecord":
        return cls(key, len(data), hashlib.sha256(data).hexdigest())


class Buffer:
    """Memory that one object after another is read into, asked for once and not for every object."""

    def __init__(self) -> None:
        self._held = bytearray()

    def room(self, size: int) -> memoryview:
        """Return so many bytes; what an earlier call returned is written over."""
        if len(self._held) < size:
            self._held = bytearray(size)
        return memoryview(self._held)[:size]


@dataclass(frozen=True)
class Location:
    """A folder or S3 prefix. Picklable: it holds its address and opens connections where it is used."""

    uri: str
    read_only: bool = False

    @classmethod
    def parse(cls, uri: str) -> "Location":
        """Return the location that `uri` names: folder, file:///folder, s3://bucket/prefix or package:NAME/path.

        Raises ValueError for any other scheme, FileNotFoundError for a package that is not installed.
        """
        if uri.startswith("package:"):
            return cls(str(_package_path(uri)), read_only=True)
        parts = urlsplit(uri)
        if parts.scheme == "s3":
            if not parts.netloc:
                raise ValueError(f"{uri} names no bucket. Write s3://bucket/prefix.")
            return cls(uri.rstrip("/"))
        if parts.scheme == "file":
            return cls(unquote(parts.path))
        if "://" in uri or not uri:
            raise ValueError(
                f"location {uri!r} is not allowed: must be a folder, file:///, s3:// or package:NAME/path."
            )
        return cls(str(Path(uri).expanduser().absolute()))

    @property
    def is_remote(self) -> bool:
        return self.uri.startswith("s3://")

    def local_path(self) -> Path | None:
        """Return the path on this machine, None on S3."""
        return None if self.is_remote else Path(self.uri)

    def child(self, *parts: str) -> "Location":
        return Location("/".join([self.uri.rstrip("/"), *parts]), self.read_only)

    def read(self, key: str = "") -> bytes:
        """Return all bytes of an object. FileNotFoundError names it."""
        return self._backend.get(self._address(key))

    def read_into(self, key: str, buffer: Buffer) -> memoryview:
        """Return all bytes of an object, held by `buffer` until its next use. FileNotFoundError names the object."""
        with self.open(key) as file:
            view = buffer.room(file.seek(0, os.SEEK_END))
            file.seek(0)
            if (found := file.readinto(view)) != len(view):  # type: ignore[attr-defined]
                raise OSError(errno.EIO, f"{found} of {len(view)} bytes were read", self._address(key))
        return view

    def read_range(self, key: str, start: int, stop: int | None = None) -> bytes:
        """Return bytes start:stop of an object; a negative `start` counts from its end, as far as it goes."""
        with self.open(key) as file:
            length = file.seek(0, os.SEEK_END)
            first = file.seek(max(length + start, 0) if start < 0 else start)
            return file.read() if stop is None else file.read(max(stop - first, 0))

    def open(self, key: str = "") -> BinaryIO:
        """Return a binary file with seek, to be closed by the caller. FileNotFoundError names it."""
        return self._backend.open_reader(self._address(key))

    def exists(self, key: str = "") -> bool:
        """Return whether an object (not a folder) of this key is there."""
        return self._backend.size(self._address(key)) is not None

    def size(self, key: str = "") -> int:
        """Return an object's length in bytes. FileNotFoundError names it."""
        found = self._backend.size(self._address(key))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self._address(key))
        return found

    def create(self, key: str, data: bytes) -> None:
        """Write a new object, durably and all at once. An equal one already there is fine.

        Raises ObjectConflict if it is there with other bytes (a lost response also ends in the comparison).
        """
        if not self._backend.create(self._writable(key), data) and self.read(key) != data:
            raise ObjectConflict(
                f"{self._address(key)} is already there with other bytes: another writer made it. "
                "Delete that unit's objects and run again, or use another run."
            )

    @contextmanager
    def create_from(self, key: str) -> Iterator[IO[bytes]]:
        """Give a file to write a large object into, and to read again; it appears under its key, whole, on a clean exit only.

        Raises ObjectConflict if the key exists by then. On S3 the check and the upload are two steps, so only a
        holder of the run's lease uses it.
        """
        address = self._writable(key)
        folder = self._backend.staging_folder(address) or Path(tempfile.gettempdir())
        name = folder / local.partial_name()  # not mkstemp, whose files nobody else may read
        try:
            with local.named_errors(address), name.open("x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if self.exists(key) or not self._backend.upload(address, name):
                raise ObjectConflict(f"{address} is already there. Use another run, or delete it first.")
        finally:
            name.unlink(missing_ok=True)

    def replace(self, key: str, data: bytes) -> None:
        """Write an object over whatever is there. Only leases and pointers may change."""
        self._backend.replace(self._writable(key), data)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        self._backend.delete(self._writable(key))

    def create_json(self, key: str, value: Any) -> None:
        """Create an object from plain data: sorted keys, indent 1. ValueError for NaN and infinities."""
        self.create(key, to_json(value))

    def read_json(self, key: str) -> Any:
        """Return the plain data of a JSON object. Raises OSError naming it if it does not parse."""
        data = self.read(key)
        try:
            return json.loads(data)
        except ValueError as error:
            raise OSError(f"{self._address(key)} is damaged, not JSON: {error}. Restore it, or delete it.") from error

    def probe(self) -> None:
        """Check that this place can be written and honours create-only puts.

        Raises OSError if not: a server on which an object could be created twice would let two workers overwrite each
        other.
        """
        key = f".probe-{secrets.token_hex(8)}"
        try:
            self.create(key, b"first")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise OSError(f"{self.uri} cannot be written: {error.strerror or error}. Use another place.") from error
        try:
            if self._backend.create(self._address(key), b"second"):
                raise OSError(f"{self.uri} ignores create-only puts (If-None-Match). Use a server that honours them.")
        finally:
            self.delete(key)

    def sweep(self) -> int:
        """Remove files that killed writers left half written, never those of a live one; return how many. None on S3."""
        path = self.local_path()
        return 0 if path is None else local.sweep(str(path))

    def fetch(self, cache: Path) -> Path:
        """Return a local folder that holds everything below: itself, or a copy under `cache`.

        The copy's name follows from address, keys, sizes and versions, so that a changed prefix is fetched anew. It
        appears under it whole. A fetch that was cut off goes on where it stopped; processes of one machine take turns.
        """
        path = self.local_path()
        if path is not None:
            return path
        entries = s3.list_versions(self.uri)
        if not entries:
            raise FileNotFoundError(f"{self.uri} holds no objects. Check the bucket and the prefix.")
        digest = hashlib.sha256(json.dumps([self.uri, entries]).encode()).hexdigest()[:16]
        target = cache / f"{self.uri.rsplit('/', 1)[-1]}-{digest}"
        if target.is_dir():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with Path(f"{target}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the system, also if this process is killed
            if not target.is_dir():
                copy = Path(f"{target}{local.PARTIAL}")
                for key, size, tag in entries:
                    _download(self, key, copy / key, size, tag)
                copy.rename(target)
        return target

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects in the folder `prefix`, recursively, sorted; [] if there is none."""
        lead = f"{prefix.rstrip('/')}/" if prefix else ""
        return sorted(lead + key for key in self._backend.list_keys(self._address(prefix.rstrip("/"))))

    @property
    def _backend(self) -> ModuleType:
        return s3 if self.is_remote else local

    def _address(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}" if key else self.uri

    def _writable(self, key: str) -> str:
        if self.read_only:
            raise PermissionError(f"{self._address(key)} is inside an installed package: read-only. Write elsewhere.")
        return self._address(key)


def to_json(value: Any) -> bytes:
    """Return plain data as UTF-8 JSON with sorted keys, indent 1 and a last line break. ValueError for NaN."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _package_path(uri: str) -> Path:
    name, _, rest = uri.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise FileNotFoundError(f"{uri}: no Python package named {name!r} is installed. Install it, or give a folder.")
    return Path(folders[0], rest) if rest else Path(folders[0])


def _download(source: Location, key: str, target: Path, size: int, tag: str) -> None:
    """Copy an object that has this size and entity tag, from where an earlier attempt was cut off.

    OSError if what arrived has another size, or another MD5 where the tag is one: that copy is thrown away.
    """
    if target.exists():  # it got its name when it was whole
        return
    part = Path(f"{target}{local.PARTIAL}")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a+b") as writer:
        if writer.tell() > size:
            writer.truncate(0)
        if (start := writer.seek(0, os.SEEK_END)) < size:
            with source.open(key) as reader:
                reader.seek(start)
                shutil.copyfileobj(reader, writer, 8 << 20)
        writer.flush()
        os.fsync(writer.fileno())
        writer.seek(0)
        md5 = hashlib.file_digest(writer, "md5").hexdigest()
        arrived = writer.tell()
    if arrived != size or (MD5.fullmatch(tag.strip('"')) and md5 != tag.strip('"')):
        part.unlink()
        raise OSError(f"{source.uri}/{key} did not arrive whole ({arrived:,} of {size:,} bytes, MD5 {md5}). Run again.")
    part.rename(target)
