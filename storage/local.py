"""Files of this machine: the same few operations as `s3`, on absolute paths, durable and all at once.

Owns temporary names, fsync and the sentence for a full disk. A file being written ends in PARTIAL; a killed process may
leave one, and no reader sees it.
"""

import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil

PARTIAL = ".partial"
DAY = 86400.0  # seconds


def get(address: str) -> bytes:
    """Return all bytes of a file. FileNotFoundError names it."""
    return Path(address).read_bytes()


def size(address: str) -> int | None:
    """Return a file's length in bytes, None if there is no such file."""
    path = Path(address)
    return path.stat().st_size if path.is_file() else None


def open_reader(address: str) -> BinaryIO:
    """Return the file, open for reading. FileNotFoundError names it."""
    return Path(address).open("rb")


def create(address: str, data: bytes) -> bool:
    """Create a file with all its bytes; False if one is already there."""
    with named_errors(address):
        partial = _write_partial(address, data)
        try:
            return _link(partial, address)
        finally:
            partial.unlink(missing_ok=True)


def replace(address: str, data: bytes) -> None:
    """Put a file in the place of whatever is there."""
    with named_errors(address):
        os.replace(_write_partial(address, data), address)
        _sync_folder(Path(address).parent)


def upload(address: str, path: Path) -> bool:
    """Give a finished file of the same file system its address; False if that is taken."""
    with named_errors(address):
        return _link(path, address)


def delete(address: str) -> None:
    """Remove a file; one that is not there is fine."""
    Path(address).unlink(missing_ok=True)


def staging_folder(address: str) -> Path:
    """Return the folder in which a large file for this address is to be written, made if need be."""
    with named_errors(address):
        folder = Path(address).parent
        _make_folder(folder)
        return folder


def partial_name() -> str:
    """Return a new name for a file being written, which tells who writes it."""
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}{PARTIAL}"


def sweep(address: str, now: Callable[[], float] = time.time) -> int:
    """Remove what writers that are gone left half written below a folder; return how many files.

    Gone is a process of this host that is no more. Of other hosts nothing is known: their files go when they are a day
    old, by this host's clock.
    """
    count, pending = 0, [address]
    while pending:
        for entry in _entries(pending.pop()):
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            elif entry.name.endswith(PARTIAL) and _is_left_behind(entry, now()):
                delete(entry.path)
                count += 1
    return count


def _is_left_behind(entry: os.DirEntry[str], now: float) -> bool:
    host, pid = [*entry.name.removesuffix(PARTIAL).rsplit(".", 2), "", ""][:2]
    if host == socket.gethostname() and pid.isdecimal():
        return not psutil.pid_exists(int(pid))
    try:
        return now - entry.stat().st_mtime > DAY
    except FileNotFoundError:  # finished meanwhile
        return False


def list_keys(address: str) -> list[str]:
    """Return the paths of all files below a folder, relative to it; [] if there is no such folder."""
    keys, pending = [], [("", address)]
    while pending:
        lead, path = pending.pop()
        for entry in _entries(path):
            if entry.is_dir():
                pending.append((f"{lead}{entry.name}/", entry.path))
            elif not entry.name.endswith(PARTIAL):
                keys.append(lead + entry.name)
    return keys


@contextmanager
def named_errors(address: str) -> Iterator[None]:
    """Say which file an error of a write is about, and what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sentence = f"No space left on device while writing {address}. Free some, then run again to resume."
        raise OSError(errno.ENOSPC, sentence) from error


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):  # never made, or deleted by another process meanwhile
        return []


def _write_partial(address: str, data: bytes) -> Path:
    path = Path(address)
    _make_folder(path.parent)
    partial = path.with_name(partial_name())
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def _link(partial: Path, address: str) -> bool:
    try:
        os.link(partial, address)
    except FileExistsError:
        return False
    _sync_folder(Path(address).parent)
    return True


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each noted durably in the one above: else a power cut could take its files."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
