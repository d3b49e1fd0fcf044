"""Files are durable, appear whole, and a full disk is said plainly."""

import errno
import os
import socket
from pathlib import Path

import pytest

from storage import local
from storage.locations import Location


def test_a_killed_writer_leaves_nothing_a_reader_sees(run: Location) -> None:
    run.create("a/b", b"1")
    (Path(run.uri) / "a" / f"c.123{local.PARTIAL}").write_bytes(b"half")
    assert run.list() == ["a/b"]


def test_the_bytes_are_synced_before_they_get_their_name(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    run.create("b", b"")
    events: list[str] = []
    sync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "link", lambda a, b: (events.append("link"), link(a, b)))
    run.create("a", b"1")
    assert events == ["sync", "link", "sync"]


@pytest.mark.parametrize("operation", ["create", "replace", "create_from"])
def test_a_power_cut_after_a_write_takes_neither_file_nor_folders(
    run: Location, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def seen(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{run.uri}/"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    if operation == "create_from":
        with run.create_from("a/b/c") as file:
            file.write(b"1")
    else:
        getattr(run, operation)("a/b/c", b"1")
    home, top, middle, file_, folder = synced
    assert [home, top, middle, folder] == [str(Path(run.uri).parent), run.uri, "a", "a/b"]
    assert file_.startswith("a/b/")


NOBODY = 2**22 + 1  # above the largest process number that Linux gives


def test_what_gone_writers_left_is_swept_and_nothing_else(run: Location) -> None:
    run.create("a/b/whole", b"1")
    folder, here = Path(run.uri) / "a" / "b", socket.gethostname()
    names = [f"{here}.{NOBODY}.ab{local.PARTIAL}", f"{here}.{os.getpid()}.cd{local.PARTIAL}",
             f"other.host.{NOBODY}.ef{local.PARTIAL}", f"9f{local.PARTIAL}"]  # fmt: skip
    for name in names:
        (folder / name).write_bytes(b"half")
    assert run.sweep() == 1
    assert {path.name for path in folder.iterdir()} == {"whole", *names[1:]}
    os.utime(folder / names[2], (0, 0))
    os.utime(folder / names[1], (0, 0))
    assert run.sweep() == 1, "old, of another host"
    assert {path.name for path in folder.iterdir()} == {"whole", names[1], names[3]}, "a live writer keeps its own"


def test_a_file_being_written_says_by_whom(run: Location) -> None:
    with run.create_from("a/b"):
        [name] = [path.name for path in (Path(run.uri) / "a").iterdir()]
        assert name.startswith(f"{socket.gethostname()}.{os.getpid()}.")
        assert run.sweep() == 0


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
