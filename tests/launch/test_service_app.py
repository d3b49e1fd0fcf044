"""Every route over HTTP: what it answers, to whom, within which limits, and how it says no."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from launch.run import Run
from launch.service import jobs
from launch.service.answers import ARROW
from launch.service.auth import add_token
from launch.service.catalog import Catalog, RunView
from launch.service.guard import Limits
from launch.service.problems import MEDIA
from tests.launch.service_runs import asking, half_done

TINY = "/v1/runs/tiny"


@pytest.fixture
def client(served: Run) -> Iterator[TestClient]:
    with asking(served.location.uri) as client:
        yield client


@pytest.fixture
def view(served: Run) -> RunView:
    return Catalog([served.location.uri]).run("tiny")


def problem(response: Any, status: int) -> str:
    """Return the detail of an answer that must be a problem of this status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA
    body = response.json()
    assert body.keys() == {"type", "title", "status", "detail"}
    assert body["status"] == status
    return body["detail"]


def test_runs_and_one_run(client: TestClient, view: RunView) -> None:
    assert client.get("/v1/runs").json() == {
        "runs": [{"name": "tiny", "state": "finished", "scores": ["first", "offline", "second"]}]
    }
    found = client.get(TINY).json()
    assert (found["manifest"], found["health"]) == (view.manifest(), {"events": {}, "latest": []})
    assert [one["label"] for one in found["scores"]] == ["first", "offline", "second"]
    assert "label" in found["scores"][0]["fields"]
    assert client.get("/healthz").json() == {"status": "ok", "runs": 1}


@pytest.mark.parametrize(
    ("path", "method", "arguments", "rows"),
    [
        ("queries?scores=first&order=query&limit=2", "queries", {"order": "query", "limit": 2}, True),
        ("queries?scores=first&misclassified=true&label=1", "queries", {"misclassified": True, "label": "1"}, True),
        ("queries/3?scores=first", "query", {"query": 3}, False),
        ("examples/7?scores=first", "example", {"example": 7}, False),
        ("examples?scores=first&limit=3", "examples", {"order": "id", "limit": 3}, True),
        ("self-influence?scores=first&limit=3&where=label:1", "examples", {"where": {"label": "1"}, "limit": 3}, True),
        ("totals?scores=first&limit=3", "examples", {"order": "-total", "limit": 3}, True),
        ("totals?scores=first&limit=3&want=keep", "examples", {"order": "total", "limit": 3}, True),
        ("histogram?scores=first&column=loss&bins=3", "histogram", {"column": "loss", "bins": 3}, False),
        ("graph?scores=first&query=1&query=2&k=2", "graph", {"queries": [1, 2], "k": 2}, False),
    ],
)  # fmt: skip
def test_routes_answer_what_the_catalog_does(
    client: TestClient, view: RunView, path: str, method: str, arguments: dict[str, Any], rows: bool
) -> None:
    expected = getattr(view, method)("first", **arguments)
    found = client.get(f"{TINY}/{path}").json()
    if rows:
        assert (found["rows"], found["total"]) == (expected.rows, expected.total)
    else:
        assert found == expected


def test_influences_of_a_query_and_of_an_example(client: TestClient, view: RunView) -> None:
    found = client.get(f"{TINY}/queries/2/influences?scores=first&k=3&where=label:1").json()
    assert found["rows"] == view.influences("first", 2, 3, where={"label": "1"})
    assert {k: found[k] for k in ("scores", "score_unit", "covered", "query")} == {
        "scores": "first", "score_unit": "loss_change", "covered": 1.0, "query": 2,
    }  # fmt: skip
    negative = client.get(f"{TINY}/queries/source:r1002/influences?scores=first&sign=negative").json()
    assert negative["rows"] == view.influences("first", 2, 10, "opponent")
    moved = client.get(f"{TINY}/examples/source:r5/influences?scores=first&k=4").json()
    assert (moved["rows"], moved["id"]) == (view.example_influences("first", 5, 4), 5)


@pytest.mark.parametrize(
    "path", ["queries", "queries/1/influences", "examples", "self-influence", "totals", "examples/3/influences"]
)
def test_lists_also_come_as_arrow(client: TestClient, path: str) -> None:
    plain = client.get(f"{TINY}/{path}?scores=first").json()
    answer = client.get(f"{TINY}/{path}?scores=first", headers={"Accept": ARROW})
    assert answer.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table.to_pylist() == plain.pop("rows")
    assert {k.decode(): v.decode() for k, v in table.schema.metadata.items()} == {k: str(v) for k, v in plain.items()}


def test_new_input_is_answered_at_once(client: TestClient, view: RunView) -> None:
    body = {"texts": ["the film was dull", "a great plot"], "labels": [None, 1]}
    found = client.post(f"{TINY}/attribute?scores=first&k=2", json=body).json()
    assert found["answers"] == view.attribute("first", body["texts"], body["labels"], 2)
    assert (found["scores"], found["score_unit"]) == ("first", "loss_change")
    record = client.post(f"{TINY}/attribute?scores=second", json={"records": [{"text": "a film", "label": 2}]})
    assert record.status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/v1/runs/other", 404, "there is no run 'other': there are tiny"),
        (f"{TINY}/queries", 422, "name one of first, offline, second"),
        (f"{TINY}/queries?scores=none", 404, "there are first, offline, second"),
        (f"{TINY}/queries/99?scores=first", 404, "have no query 99: there are 5"),
        (f"{TINY}/queries/source:x/influences?scores=first", 404, "'x'"),
        (f"{TINY}/queries/-1?scores=first", 422, "path.id"),
        (f"{TINY}/examples/999999999999999/influences?scores=first", 404, "there are 45"),
        (f"{TINY}/queries/1/influences?scores=first&k=0", 422, "query.k"),
        (f"{TINY}/queries/1/influences?scores=first&k=1001", 422, "less than or equal to 1000"),
        (f"{TINY}/queries/1/influences?scores=first&where=label", 422, "field:value"),
        (f"{TINY}/queries/1/influences?scores=first&where=label:1&where=label:2", 422, "each field once"),
        (f"{TINY}/queries/1/influences?scores=first&where=nothing:1", 422, "where=nothing"),
        (f"{TINY}/examples?scores=first&limit=501", 422, "less than or equal to 500"),
        (f"{TINY}/examples?scores=first&offset=-1", 422, "query.offset"),
        (f"{TINY}/images/train/1?scores=first", 404, "no image"),
        (f"{TINY}/images/..%2f..%2fstages/1", 404, "Not Found"),
        (f"{TINY}/images/journal/1", 404, "no set 'journal': there are asked, train"),
        (f"{TINY}/jobs/0123456789abcdef", 404, "no job"),
        (f"{TINY}/jobs/%2e%2e%2f%2e%2e", 404, "Not Found"),
        ("/v1/runs/..%2F..%2Fetc%2Fpasswd", 404, "Not Found"),
        ("/v1/nothing", 404, "Not Found"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_not_allowed_is_said(client: TestClient, path: str, status: int, says: str) -> None:
    assert says in problem(client.get(path), status)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "give exactly one of"),
        ({"texts": ["a"], "records": [{}]}, "give exactly one of"),
        ({"texts": ["a film"], "labels": [1, 2]}, "2 labels for 1 questions"),
        ({"texts": ["a film"] * 33}, "33 questions are not allowed: at most 32"),
        ({"texts": [""]}, "at least 1 character"),
        ({"texts": ["a"], "path": "/etc/passwd"}, "Extra inputs"),
        ({"texts": ["a film"], "labels": [17]}, "field 'label' is 17"),
        ({"records": [{"nothing": 1}]}, "text"),
    ],
)
def test_questions_that_cannot_be_are_refused(client: TestClient, body: dict[str, Any], says: str) -> None:
    assert says in problem(client.post(f"{TINY}/attribute?scores=first", json=body), 422)


def test_no_method_but_those_described(client: TestClient) -> None:
    response = client.delete(f"{TINY}/queries")
    problem(response, 405)
    assert response.headers["allow"] == "GET"


def test_a_strange_host_name_is_not_answered(client: TestClient) -> None:
    assert "localhost" in problem(client.get("/v1/runs", headers={"Host": "attacker.example:8000"}), 400)
    assert client.get("/healthz", headers={"Host": "localhost:8000"}).status_code == 200


def test_only_a_valid_token_is_let_in(served: Run, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    token = add_token(file, "reader", "read")
    with asking(served.location.uri, tokens=str(file)) as client:
        for wrong in (
            None,
            "Bearer",
            f"Bearer {token}x",
            f"Bearer {token[:-1]}",
            f"Basic {token}",
            "Bearer reader.",
            token,
        ):
            for path in ("/v1/runs", f"{TINY}/queries/1/influences?scores=first", "/metrics", "/v1/nothing"):
                response = client.get(path, headers={"Authorization": wrong} if wrong else {})
                problem(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
        given = {"Authorization": f"Bearer {token}"}
        assert client.get("/v1/runs", headers=given).status_code == 200
        assert client.get("/metrics", headers=given).status_code == 200
        assert client.get("/healthz").status_code == client.get("/openapi.json").status_code == 200
        offline = client.post(f"{TINY}/attribute?scores=offline", json={"texts": ["a film"]}, headers=given)
        assert "only an admin's token may start" in problem(offline, 403)
        file.write_text("[]")
        problem(client.get("/v1/runs", headers=given), 401)


def test_only_hashes_of_tokens_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    token = add_token(file, "ci", "admin")
    secret = token.partition(".")[2]
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    other = add_token(file, "ci2", "read")
    salts = {entry["salt"] for entry in json.loads(file.read_text())}
    assert len(salts) == 2
    assert other != token
    for name, role, says in (
        ("ci", "read", "one that is not in use"),
        ("../x", "read", "letters"),
        ("x", "root", "role"),
    ):
        with pytest.raises(ValueError, match=says):
            add_token(file, name, role)


def test_a_body_beyond_the_limit_is_refused(served: Run) -> None:
    with asking(served.location.uri, limits=Limits(body=1000)) as client:
        big = json.dumps({"texts": ["x" * 2000]}).encode()
        assert "1000 bytes" in problem(client.post(f"{TINY}/attribute?scores=first", content=big), 413)

        def pieces() -> Iterator[bytes]:  # no Content-Length
            yield from (big[i : i + 100] for i in range(0, len(big), 100))

        json_body = {"Content-Type": "application/json"}
        assert "1000 bytes" in problem(client.post(f"{TINY}/attribute", content=pieces(), headers=json_body), 413)


def test_too_many_questions_at_once_are_told_to_wait(served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Semaphore(0), threading.Event()

    def slow(*_: Any) -> list[Any]:
        begun.release()
        assert go.wait(30)
        return []

    monkeypatch.setattr(RunView, "attribute", slow)
    with asking(served.location.uri, limits=Limits(waiting=2)) as client:
        answers: list[int] = []

        def ask() -> None:
            answers.append(client.post(f"{TINY}/attribute?scores=first", json={"texts": ["a"]}).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert begun.acquire(timeout=30)
        deadline = time.monotonic() + 30
        while "influence_attributing 2.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        response = client.post(f"{TINY}/attribute?scores=first", json={"texts": ["a"]})
        assert "try later" in problem(response, 429)
        assert response.headers["retry-after"] == "2"
        go.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        assert "influence_attributing 0.0" in client.get("/metrics").text


def test_an_answer_that_takes_too_long_is_given_up(served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(RunView, "attribute", lambda *_: go.wait(30))
    with asking(served.location.uri, limits=Limits(seconds=0.05)) as client:
        problem(client.post(f"{TINY}/attribute?scores=first", json={"texts": ["a"]}), 504)
        go.set()


def test_a_bug_and_a_failing_storage_tell_nothing(served: Run, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(error: Exception) -> Any:
        def raising(*_: Any, **__: Any) -> Any:
            raise error

        return raising

    with asking(served.location.uri) as client:
        monkeypatch.setattr(RunView, "histogram", fail(RuntimeError("secret inside")))
        assert "secret" not in problem(client.get(f"{TINY}/histogram?scores=first"), 500)
        monkeypatch.setattr(RunView, "histogram", fail(OSError("s3://secret/key")))
        response = client.get(f"{TINY}/histogram?scores=first")
        assert "secret" not in problem(response, 503)
        assert response.headers["retry-after"] == "5"
    assert "secret inside" in caplog.text


def test_a_run_in_the_middle_of_its_job_says_what_is_covered(served: Run, tmp_path: Path) -> None:
    run = half_done(Path(served.location.uri), tmp_path / "half")
    with asking(run, tmp_path / "empty") as client:
        found = client.get("/v1/runs/half/queries/1/influences").json()
        assert (found["covered"], {row["id"] < 16 for row in found["rows"]}) == (16 / 45, {True})
        assert "are being made: 36%" in problem(client.post("/v1/runs/half/attribute", json={"texts": ["a"]}), 409)
        response = client.get("/v1/runs/empty/queries")
        assert "no scores yet" in problem(response, 409)
        assert response.headers["retry-after"] == "10"
        assert client.get("/v1/runs/empty").json()["progress"]["state"] == "waiting"


def test_a_question_that_takes_a_job_gets_one(served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job runs in this process here; its own process is a matter of `test_service_job.py`."""
    started: list[str] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command[-1])
            self.ended: int | None = None

        def poll(self) -> int | None:
            return self.ended

    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    body = {"texts": ["the film was dull"], "labels": [1]}
    with asking(served.location.uri) as client:
        answer = client.post(f"{TINY}/attribute?scores=offline", json=body)
        assert answer.status_code == 202
        job = answer.json()
        assert job["url"] == answer.headers["location"]
        assert (job["state"], job["answers"]) == ("waiting", None)
        again = client.post(f"{TINY}/attribute?scores=offline", json=body).json()
        assert (again["job"], len(started)) == (job["job"], 1), "the same question is the same job"
        other = client.post(f"{TINY}/attribute?scores=offline", json={"texts": ["a"], "labels": [0]})
        assert "a job is at work" in problem(other, 429)
        assert other.headers["retry-after"] == "60"
        jobs.work(started[0])
        found = client.get(f"{job['url']}?k=3").json()
        assert found["state"] == "finished"
        expected = served.ask([{"text": "the film was dull"}], [1], 3, served.setting("first"))[0]
        assert [row["id"] for row in found["answers"][0]["proponents"]] == [row["id"] for row in expected.proponents]


def test_a_job_that_fails_says_why_and_may_be_tried_again(served: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command[-1])

        def poll(self) -> int:
            return 1

    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    body = {"texts": ["a film"], "labels": [17]}
    with asking(served.location.uri) as client:
        url = client.post(f"{TINY}/attribute?scores=offline", json=body).json()["url"]
        with pytest.raises(ValueError, match="17"):
            jobs.work(started[0])
        found = client.get(url).json()
        assert (found["state"], "17" in found["detail"]) == ("failed", True)
        client.post(f"{TINY}/attribute?scores=offline", json=body)
        assert len(started) == 2


def test_metrics_count_by_route_and_hold_no_ids(client: TestClient) -> None:
    client.get(f"{TINY}/queries/3?scores=first")
    client.get(f"{TINY}/queries/99?scores=first")
    text = client.get("/metrics").text
    route = 'route="/v1/runs/{run}/queries/{id}"'
    assert f'influence_requests_total{{method="GET",{route},status="200"}} 1.0' in text
    assert f'influence_requests_total{{method="GET",{route},status="404"}} 1.0' in text
    assert f"influence_request_seconds_count{{{route}}} 2.0" in text
    assert "tiny" not in text


def test_openapi_describes_every_route_and_every_problem(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert len(described) == 17
    for path, method in described:
        route = document["paths"][path][method]
        assert route["description"], path
        assert route["tags"], path
        for status, answer in route["responses"].items():
            if status >= "400":
                assert answer["content"].keys() == {MEDIA}, (path, status)
        if path.startswith("/v1"):
            assert {"401", "503", "504"} <= route["responses"].keys()
    assert "Problem" in document["components"]["schemas"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_no_page_that_would_load_from_elsewhere(client: TestClient) -> None:
    for path in ("/docs", "/redoc"):
        problem(client.get(path), 404)
