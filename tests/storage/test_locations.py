"""What every location must do, on a folder and on S3."""

import math
import pickle
from pathlib import Path

import pytest

from storage import locations
from storage.locations import Buffer, Location, ObjectConflict


def test_what_is_created_is_read_back(place: Location) -> None:
    place.create("a/b", b"0123456789")
    assert place.read("a/b") == b"0123456789"
    assert place.exists("a/b")
    assert place.size("a/b") == 10
    assert not place.exists("a")
    assert place.child("a").read("b") == b"0123456789"
    assert place.child("a", "b").read() == b"0123456789"


def test_ranges(place: Location) -> None:
    place.create("a", b"0123456789")
    assert place.read_range("a", 2, 5) == b"234"
    assert place.read_range("a", 7) == b"789"
    assert place.read_range("a", -3) == b"789"
    assert place.read_range("a", -30) == b"0123456789"
    with place.open("a") as file:
        file.seek(-4, 2)
        assert (file.tell(), file.read(2), file.read(), file.read()) == (6, b"67", b"89", b"")


def test_objects_are_read_one_after_another_into_the_same_memory(place: Location) -> None:
    place.create("long", b"0123456789")
    place.create("short", b"abc")
    place.create("empty", b"")
    buffer = Buffer()
    long = place.read_into("long", buffer)
    assert long == b"0123456789"
    assert place.read_into("short", buffer) == b"abc"
    assert long == b"abc3456789", "an earlier answer is written over"
    assert place.read_into("empty", buffer) == b""
    with pytest.raises(FileNotFoundError, match="missing"):
        place.read_into("missing", buffer)


def test_create_keeps_the_first_bytes(place: Location) -> None:
    place.create("a", b"first")
    place.create("a", b"first")
    with pytest.raises(ObjectConflict, match="/a is already there with other bytes"):
        place.create("a", b"second")
    assert place.read("a") == b"first"


def test_replace_and_delete(place: Location) -> None:
    place.replace("a", b"1")
    place.replace("a", b"2")
    assert place.read("a") == b"2"
    place.delete("a")
    place.delete("a")
    assert not place.exists("a")


@pytest.mark.parametrize("operation", ["read", "size", "open"])
def test_a_missing_object_is_named(place: Location, operation: str) -> None:
    with pytest.raises(FileNotFoundError, match="some/thing"):
        getattr(place, operation)("some/thing")


def test_list_is_by_folder_and_sorted(place: Location) -> None:
    for key in ("b/2", "b/10", "b/c/1", "bb/1", "a"):
        place.create(key, b"")
    assert place.list() == ["a", "b/10", "b/2", "b/c/1", "bb/1"]
    assert place.list("b") == place.list("b/") == ["b/10", "b/2", "b/c/1"]
    assert place.list("nothing") == []


def test_large_object_appears_only_when_whole(place: Location) -> None:
    with pytest.raises(RuntimeError, match="killed"), place.create_from("big") as file:
        file.write(b"half")
        assert not place.exists("big")
        raise RuntimeError("killed")
    assert place.list() == []
    with place.create_from("big") as file:
        file.write(b"whole")
    with pytest.raises(ObjectConflict, match="big is already there"), place.create_from("big") as file:
        file.write(b"other")
    assert place.read("big") == b"whole"
    assert place.list() == ["big"]


def test_json_is_plain_and_readable(place: Location) -> None:
    place.create_json("a.json", {"b": 1, "a": "ü"})
    assert place.read("a.json") == '{\n "a": "ü",\n "b": 1\n}\n'.encode()
    assert place.read_json("a.json") == {"a": "ü", "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        place.create_json("b.json", math.nan)
    place.create("c.json", b"{")
    with pytest.raises(OSError, match="c.json is damaged, not JSON"):
        place.read_json("c.json")


def test_locations_travel_to_workers(place: Location) -> None:
    place.create("a", b"1")
    assert pickle.loads(pickle.dumps(place)).read("a") == b"1"


def test_probe_refuses_a_place_that_overwrites(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    place.probe()
    assert place.list() == []

    def careless(address: str, data: bytes) -> bool:
        backend.replace(address, data)
        return True

    backend = locations.s3 if place.is_remote else locations.local
    monkeypatch.setattr(backend, "create", careless)
    with pytest.raises(OSError, match="ignores create-only puts"):
        place.probe()


def test_fetch_copies_only_what_is_remote(place: Location, tmp_path: Path) -> None:
    place.create("model/w", b"1")
    place.create("model/deep/c", b"2")
    folder = place.child("model").fetch(tmp_path / "cache")
    assert ((folder / "w").read_bytes(), (folder / "deep/c").read_bytes()) == (b"1", b"2")
    assert (folder == place.child("model").local_path()) != place.is_remote
    assert place.child("model").fetch(tmp_path / "cache") == folder
    place.replace("model/w", b"3")
    assert (place.child("model").fetch(tmp_path / "cache") / "w").read_bytes() == b"3"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b"),
        ("file:///a/with%20space", "/a/with space"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_parse(uri: str, expected: str) -> None:
    assert Location.parse(uri).uri == expected
    assert Location.parse(expected) == Location.parse(uri)


def test_parse_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.parse("runs/demo").local_path() == tmp_path / "runs/demo"


@pytest.mark.parametrize("uri", ["gs://bucket/a", "", "s3:///key"])
def test_parse_refuses(uri: str) -> None:
    with pytest.raises(ValueError, match=r"is not allowed: must be|names no bucket"):
        Location.parse(uri)


def test_packages_are_read_only() -> None:
    package = Location.parse("package:json")
    assert b"JSONDecoder" in package.read("decoder.py")
    assert b"JSONDecoder" in Location.parse("package:json/decoder.py").read()
    for write in (package.create, package.replace):
        with pytest.raises(PermissionError, match="read-only"):
            write("new", b"")
    with pytest.raises(PermissionError, match="read-only"):
        package.child("x").delete("decoder.py")
    with pytest.raises(FileNotFoundError, match="no Python package named 'no_such_package'"):
        Location.parse("package:no_such_package/x")
