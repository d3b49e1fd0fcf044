"""The Python client says what the run itself says, and turns problems into errors."""

from collections.abc import Iterator

import httpx2
import pytest

from launch import client as module
from launch.client import Client, ask
from launch.query import answer
from launch.run import Run
from tests.launch.service_runs import asking


@pytest.fixture
def service(served: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client whose requests go to an application in this process."""
    with asking(served.location.uri) as app:

        def connect(base_url: str, headers: dict[str, str], timeout: float) -> httpx2.Client:
            app.base_url = httpx2.URL(base_url)
            app.headers.update(headers)
            return app

        monkeypatch.setattr(module.httpx2, "Client", connect)
        yield Client("http://localhost/", token="t")


def test_a_stored_query_is_answered_as_by_query_py(service: Client, served: Run) -> None:
    for query in ("2", "source:r1002"):
        found = ask(service, "tiny", query, None, None, 3, "first")
        expected = answer(served, query, top=3, scores="first")
        for side in ("proponents", "opponents"):
            assert [(row["id"], row["score"]) for row in found[side]] == [(r["id"], r["score"]) for r in expected[side]]
        assert {k: found[k] for k in ("method", "score_unit", "scores")} == {
            k: expected[k] for k in ("method", "score_unit", "scores")
        }
        assert (found["query"]["id"], found["query"]["text"]) == (2, expected["query"]["text"])


def test_a_new_text_and_another_label(service: Client, served: Run) -> None:
    found = ask(service, "tiny", None, "the film was dull", None, 3, "first")
    expected = answer(served, None, "the film was dull", None, 3, "first")
    assert [row["id"] for row in found["proponents"]] == [row["id"] for row in expected["proponents"]]
    assert found["query"]["label"] == found["query"]["predicted"] == expected["query"]["label"]
    found = ask(service, "tiny", "1", None, "2", 3, "first")
    expected = answer(served, "1", None, "2", 3, "first")
    assert [row["id"] for row in found["opponents"]] == [row["id"] for row in expected["opponents"]]


def test_tables_are_arrow(service: Client) -> None:
    table = service.table("runs/tiny/queries/1/influences", scores="first", k=2)
    rows = service.get("runs/tiny/queries/1/influences", scores="first", k=2)["rows"]
    assert table.to_pylist() == rows


def test_problems_become_errors(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="404: there is no run 'none'"):
        service.get("runs/none")
    with pytest.raises(ValueError, match="give either --query"):
        ask(service, "tiny", None, None, None, 3, None)

    def refuse(*_: object, **__: object) -> None:
        raise httpx2.ConnectError("refused")

    monkeypatch.setattr(service._http, "request", refuse)
    with pytest.raises(OSError, match=r"does not answer: refused\. Is launch/serve\.py running"):
        service.get("runs")


def test_a_job_is_pointed_at(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "attribute", lambda *_: {"job": "1", "url": "/v1/runs/tiny/jobs/1"})
    with pytest.raises(ValueError, match="look at /v1/runs/tiny/jobs/1"):
        ask(service, "tiny", None, "a film", "1", 3, "offline")
