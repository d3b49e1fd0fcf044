"""Files are durable, appear whole, and a full disk is said plainly."""

import errno
import os
from pathlib import Path

import pytest

from storage import local
from storage.locations import Location


def test_a_killed_writer_leaves_nothing_a_reader_sees(run: Location) -> None:
    run.create("a/b", b"1")
    (Path(run.uri) / "a" / f"c.123{local.PARTIAL}").write_bytes(b"half")
    assert run.list() == ["a/b"]


def test_the_bytes_are_synced_before_they_get_their_name(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "link", lambda a, b: (events.append("link"), link(a, b)))
    run.create("a", b"1")
    assert events == ["sync", "link", "sync"]


@pytest.mark.parametrize("operation", ["create", "replace", "create_from"])
def test_a_full_disk_is_named(run: Location, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device while writing {run.uri}/a. Free some") as caught:
        if operation == "create_from":
            with run.create_from("a") as file:
                file.write(b"1")
        else:
            getattr(run, operation)("a", b"1")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(run.uri) == []


def test_other_errors_stay_what_they_are(run: Location) -> None:
    run.create("file", b"")
    with pytest.raises(FileExistsError, match="run/file"):
        run.create("file/below", b"")
