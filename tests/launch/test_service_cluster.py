"""The service over S3, as a Ray Serve deployment, and a job in a process of its own."""

import socket
import time
from pathlib import Path

import httpx2
import pytest
from ray import serve

from launch.run import Run
from launch.service.app import Settings
from launch.service.catalog import Catalog
from launch.service.on_ray import NAME, start_on_ray
from storage.locations import Location
from tests.end_to_end.test_s3 import upload
from tests.launch.service_runs import asking
from tests.storage.conftest import bucket, s3_endpoint

__all__ = ["bucket", "s3_endpoint"]
pytestmark = pytest.mark.cluster


def test_a_run_on_s3_answers_as_the_one_in_a_folder(served: Run, bucket: str) -> None:
    uri = f"s3://{bucket}/service/tiny"
    upload(Path(served.location.uri), Location.parse(uri))
    with asking(uri) as remote, asking(served.location.uri) as local:
        for path in (
            "", "/queries?scores=first", "/queries/1/influences?scores=first", "/examples/3/influences?scores=first",
            "/self-influence?scores=first&where=label:1", "/histogram?scores=second", "/examples/4?scores=first",
        ):  # fmt: skip
            found, expected = (client.get(f"/v1/runs/tiny{path}").json() for client in (remote, local))
            for one in (found, expected):
                one.pop("progress", None)  # says when it was looked up
            assert found == expected, path
        body = {"texts": ["the film was dull"]}
        answers = [c.post("/v1/runs/tiny/attribute?scores=first", json=body).json() for c in (remote, local)]
        assert answers[0] == answers[1]
    assert Catalog([uri]).run("tiny").progress()["state"] == "finished"


def test_a_job_runs_in_a_process_of_its_own(served: Run) -> None:
    with asking(served.location.uri) as client:
        body = {"texts": ["always a fine plot"], "labels": [2]}
        url = client.post("/v1/runs/tiny/attribute?scores=offline", json=body).json()["url"]
        deadline = time.monotonic() + 240
        while (found := client.get(url).json())["state"] in ("waiting", "running"):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        assert found["state"] == "finished", found
        (expected,) = served.ask([{"text": "always a fine plot"}], [2], 10, served.setting("first"))
        assert [row["id"] for row in found["answers"][0]["proponents"]] == [row["id"] for row in expected.proponents]


def test_the_same_app_as_a_ray_serve_deployment(served: Run, local_ray: None) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    try:
        start_on_ray(Settings([served.location.uri]), "127.0.0.1", port, replicas=1)
        with asking(served.location.uri) as client:
            expected = client.get("/v1/runs/tiny/queries/1/influences?scores=first").json()
        answer = httpx2.get(f"http://127.0.0.1:{port}/v1/runs/tiny/queries/1/influences?scores=first", timeout=60)
        assert answer.json() == expected
        assert httpx2.get(f"http://127.0.0.1:{port}/v1/runs/..%2f..", timeout=60).status_code == 404
        assert serve.status().applications[NAME].status == "RUNNING"
    finally:
        serve.shutdown()
