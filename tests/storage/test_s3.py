"""S3 as boto3 finds it; everything a location does is tested on it in test_locations.py."""

import boto3
import pytest

from storage.locations import Location


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
