"""The whole job on S3: run, corpus, queries and checkpoints all under s3://, the same bytes as in a folder."""

from pathlib import Path

import pytest

from storage.locations import Location
from storage.verify import verify
from tests.end_to_end.answers import digests
from tests.end_to_end.conftest import Settings, run_job
from tests.end_to_end.test_same_result import ARTEFACTS
from tests.storage.conftest import bucket, real_bucket, real_endpoint, s3_endpoint  # noqa: F401  fixtures


def upload(folder: Path, target: Location) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            target.create(str(file.relative_to(folder)), file.read_bytes())


@pytest.mark.parametrize("server", ["bucket", pytest.param("real_bucket", marks=pytest.mark.cluster)])
def test_a_run_on_s3(settings: Settings, inputs: Path, server: str, request: pytest.FixtureRequest) -> None:
    home = f"s3://{request.getfixturevalue(server)}"
    upload(inputs, Location.parse(f"{home}/inputs"))
    local = run_job(settings())
    remote = run_job(
        settings(
            run=f"{home}/run",
            corpus=f"{home}/inputs/train.jsonl",
            queries={"path": f"{home}/inputs/queries.jsonl"},
            checkpoints=f"{home}/inputs/model",
        )
    )
    a, b = digests(local, *ARTEFACTS), digests(remote, *ARTEFACTS)
    where = "index/scores/meta.json"  # names the checkpoints by their URIs, which differ
    assert a.pop(where) != b.pop(where)
    assert a == b
    assert remote.top(1, k=3).equals(local.top(1, k=3))
    assert remote.score(["the film was dull"], k=2) == local.score(["the film was dull"], k=2)
    assert not verify(remote.location).damages
    remote.location.delete("gradients/train/checkpoint-20/000000.0/rows/c/1/0")
    [damage] = verify(remote.location).damages
    assert damage.rows == "rows 16:32 of segment 000000.0"
