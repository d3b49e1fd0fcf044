"""The fuzz at toy size; and that it would see a crash, an undocumented answer and an open door."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from launch.experiments import api_fuzz
from launch.service.catalog import RunView
from launch.service.guard import Guard
from launch.validate import experiment_config

CONFIG = experiment_config("api-fuzz", toy=True)


def test_toy_pass() -> None:
    done = {cell: api_fuzz.run_cell(CONFIG, cell) for cell in api_fuzz.cells(CONFIG)}
    assert json.loads(json.dumps(done)) == done
    gates = {gate.name: gate.record() for gate in api_fuzz.gates(CONFIG, done)}
    assert {name: gate["pass"] for name, gate in gates.items()} == dict.fromkeys(gates, True), done


def test_an_open_door_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "_refusal", lambda self, scope: scope.__setitem__("role", "admin"))
    with api_fuzz.served(CONFIG) as (tap, token):
        client = TestClient(tap, "http://localhost")
        assert api_fuzz.send_tokens(client, token, CONFIG, 0)
        assert not api_fuzz.send_paths(client, token, CONFIG, 0)


def test_a_crash_and_an_undocumented_answer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("crash")

    monkeypatch.setattr(RunView, "histogram", crash)
    monkeypatch.setattr(RunView, "graph", lambda *_: {"nodes": []})
    with api_fuzz.served(CONFIG) as (tap, token):
        wrong = "\n".join(
            api_fuzz.send_generated(tap, token, CONFIG | {"examples": 2, "routes": ["histogram", "graph"]}, 0)
        )
    assert "histogram: ServerError" in wrong
    assert "graph: JsonSchemaError" in wrong
    assert tap.statuses[500] > 0
    gates = api_fuzz.gates(CONFIG, {"a": {"statuses": {"500": 3}, "wrong": ["x"], "let_in": ["y"]}})
    assert [gate.record()["pass"] for gate in gates] == [False] * 4


def test_a_file_beside_the_run_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with api_fuzz.served(CONFIG) as (tap, token):
        secret = api_fuzz.small_run(CONFIG).parent / api_fuzz.SECRET
        monkeypatch.setattr(RunView, "manifest", lambda _: {"leak": secret.read_text()})
        TestClient(tap, "http://localhost").get("/v1/runs/reviews", headers={"Authorization": f"Bearer {token}"})
        assert tap.marked == 1
