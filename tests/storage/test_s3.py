"""S3 as boto3 finds it; everything a location does is tested on it in test_locations.py."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from launch.experiments.tcp_proxy import Fault, TcpProxy
from storage import local, s3
from storage.locations import Location, ObjectConflict


def test_the_bucket_is_the_one_boto3_sees(bucket: str) -> None:
    Location.parse(f"s3://{bucket}/run").create("a/b", b"1")
    listed = boto3.client("s3", region_name="us-east-1").list_objects_v2(Bucket=bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["run/a/b"]


def test_a_bucket_without_prefix(bucket: str) -> None:
    whole = Location.parse(f"s3://{bucket}")
    whole.create("a", b"1")
    assert whole.list() == ["a"]
    assert whole.read("a") == b"1"
    assert not whole.exists()


def test_a_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(OSError, match="s3://no-such-bucket/a"):
        Location.parse("s3://no-such-bucket").read("a")


def test_missing_credentials_say_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boto3.Session, "get_credentials", lambda self: None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    with pytest.raises(PermissionError, match="no AWS credentials found. Set AWS_ACCESS_KEY_ID"):
        Location.parse("s3://bucket/run").read("a")


def test_a_lost_response_to_our_own_put_is_no_conflict(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage import s3

    put = s3.obstore.put

    def lossy(store: object, key: str, data: bytes, **options: object) -> None:
        put(store, key, data, **options)
        put(store, key, data, **options)  # what the client's own retry does after a lost response

    monkeypatch.setattr(s3.obstore, "put", lossy)
    place = Location.parse(f"s3://{bucket}/run")
    place.create("a", b"mine")
    assert place.read("a") == b"mine"


@pytest.mark.parametrize("server", ["bucket", pytest.param("real_bucket", marks=pytest.mark.cluster)])
def test_a_fetch_that_was_cut_off_goes_on(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Location.parse(f"s3://{request.getfixturevalue(server)}/model")
    for key, size in {"a.bin": 1000, "b.bin": 20_000_000}.items():
        source.create(key, (bytes(range(251)) * (size // 251 + 1))[:size])
    read: list[int] = []
    readinto = s3._Ranges.readinto

    def cut(self: s3._Ranges, buffer: Any) -> int:
        count = readinto(self, buffer)
        read.append(count)
        if sum(read) > 12_000_000:
            raise ConnectionResetError("cut")
        return count

    with monkeypatch.context() as patch, pytest.raises(ConnectionResetError):
        patch.setattr(s3._Ranges, "readinto", cut)
        source.fetch(tmp_path)
    assert next(p.name for p in tmp_path.iterdir() if p.is_dir()).endswith(local.PARTIAL), (
        "no part stands for the whole"
    )
    left = next(tmp_path.rglob(f"b.bin{local.PARTIAL}")).stat().st_size
    again: list[int] = []
    monkeypatch.setattr(s3._Ranges, "readinto", lambda self, b: again.append(n := readinto(self, b)) or n)
    folder = source.fetch(tmp_path)
    assert 0 < left == 20_000_000 - sum(again)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        k: source.read(k) for k in ("a.bin", "b.bin")
    }


def test_a_fetch_that_arrives_altered_is_refused_and_made_anew(bucket: str, tmp_path: Path) -> None:
    source = Location.parse(f"s3://{bucket}/model")
    source.create("a.bin", b"0123456789")
    folder = source.fetch(tmp_path)
    part = folder.rename(f"{folder}{local.PARTIAL}") / "a.bin"
    part.rename(f"{part}{local.PARTIAL}").write_bytes(b"0x23")
    with pytest.raises(OSError, match=r"a\.bin did not arrive whole \(10 of 10 bytes, MD5"):
        source.fetch(tmp_path)
    assert (source.fetch(tmp_path) / "a.bin").read_bytes() == b"0123456789"


@pytest.fixture
def proxied(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TcpProxy, Location]]:
    """A bucket behind a proxy that spoils requests."""
    with TcpProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        place = Location.parse(f"s3://{bucket}/run")
        place.create("old", b"there before")
        yield proxy, place


@pytest.mark.parametrize("fault", ["reset", "lost", "cut", "busy"])
def test_a_broken_connection_ends_no_operation(
    proxied: tuple[TcpProxy, Location], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "WAITS", (0.0, 0.0))
    proxy, place = proxied
    operations: list[tuple[Callable[[], Any], Any]] = [
        (lambda: place.create("new", b"1"), None),
        (lambda: place.replace("old", b"2"), None),
        (lambda: place.read("old"), b"2"),
        (lambda: place.list(), ["new", "old"]),
        (lambda: place.delete("old"), None),
        (lambda: place.exists("old"), False),
        (lambda: place.read("new"), b"1"),
    ]
    for operation, answer in operations:
        proxy.spoil(fault)
        assert operation() == answer
    assert proxy.spoiled == len(operations)


def test_a_put_whose_answer_is_lost_still_sees_another_writers_object(proxied: tuple[TcpProxy, Location]) -> None:
    proxy, place = proxied
    proxy.spoil("lost")
    with pytest.raises(ObjectConflict, match="another writer made it"):
        place.create("old", b"other bytes")
    assert place.read("old") == b"there before"


def test_a_connection_that_always_breaks_is_said(
    proxied: tuple[TcpProxy, Location], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "WAITS", (0.0,))
    proxy, place = proxied
    for _ in range(2):
        proxy.spoil("reset")
    with pytest.raises(OSError, match="error sending request"):
        place.create("new", b"1")
