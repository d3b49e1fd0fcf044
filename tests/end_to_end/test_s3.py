"""The whole job on S3: run, corpus, queries and checkpoints all under s3://, the same bytes as in a folder."""

from pathlib import Path

from storage.locations import Location
from tests.end_to_end.answers import digests
from tests.end_to_end.conftest import Settings, run_job
from tests.end_to_end.test_same_result import ARTEFACTS
from tests.storage.conftest import bucket, s3_endpoint  # noqa: F401  fixtures


def upload(folder: Path, target: Location) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            target.create(str(file.relative_to(folder)), file.read_bytes())


def test_a_run_on_s3(settings: Settings, inputs: Path, bucket: str) -> None:  # noqa: F811
    home = f"s3://{bucket}/inputs"
    upload(inputs, Location.parse(home))
    local = run_job(settings())
    remote = run_job(
        settings(
            run=f"s3://{bucket}/run",
            corpus=f"{home}/train.jsonl",
            queries={"path": f"{home}/queries.jsonl"},
            checkpoints=f"{home}/model",
        )
    )
    a, b = digests(local, *ARTEFACTS), digests(remote, *ARTEFACTS)
    where = "index/scores/meta.json"  # names the checkpoints by their URIs, which differ
    assert a.pop(where) != b.pop(where)
    assert a == b
    assert remote.top(1, k=3).equals(local.top(1, k=3))
    assert remote.score(["the film was dull"], k=2) == local.score(["the film was dull"], k=2)
