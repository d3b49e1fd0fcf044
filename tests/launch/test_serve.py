"""The command: what it refuses, how it hands its settings on, and a service with tokens on a real port."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from launch import serve
from launch.run import Run
from launch.service.app import Settings, from_environment, to_environment
from launch.service.auth import Tokens
from launch.service.guard import LOOPBACK, Limits


def test_an_open_port_needs_tokens() -> None:
    with pytest.raises(ValueError, match=r"--host 0\.0\.0\.0 is open to others: give --tokens FILE"):
        serve.settings_of(["r"], "0.0.0.0", None, [], True)
    with pytest.raises(ValueError, match="RUN is missing"):
        serve.settings_of([], "127.0.0.1", None, [], True)


def test_without_tokens_only_loopback_names_are_answered(tmp_path: Path) -> None:
    assert serve.settings_of(["r"], "127.0.0.1", None, [], True).hosts == LOOPBACK
    assert serve.settings_of(["r"], "127.0.0.1", None, ["box"], True).hosts == (*LOOPBACK, "box")
    assert serve.settings_of(["r"], "0.0.0.0", str(tmp_path / "t"), [], True).hosts == ()


def test_settings_reach_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFLUENCE_SERVICE", "")
    to_environment(Settings([str(tmp_path / "a")], limits=Limits(texts=3)))
    app = from_environment()
    assert app.state.service.limits.texts == 3
    assert app.state.service.catalog.names == ["a"]


def test_a_token_is_made_and_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.json"
    serve.token(file, "ci", "admin")
    token = capsys.readouterr().out.strip()
    assert Tokens(file).role(token) == "admin"
    with pytest.raises(SystemExit):
        serve.token(file, "ci", "admin")
    assert "one that is not in use" in capsys.readouterr().err


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_answers_on_its_port(
    served: Run, tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens.json"
    serve.token(tokens, "ci", "read")
    token = capfd.readouterr().out.strip()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "launch/serve.py", served.location.uri, "--port", str(port), "--tokens", str(tokens)]
    process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}) as client:
            for _ in range(1200):
                try:
                    client.get("/healthz")
                    break
                except httpx2.TransportError:
                    time.sleep(0.1)
            assert [run["name"] for run in client.get("/v1/runs").json()["runs"]] == ["tiny"]
            for _ in range(5):
                assert client.get("/v1/runs/tiny/queries/1/influences?scores=first").status_code == 200
            text = client.get("/metrics").text
            assert (
                'influence_requests_total{method="GET",route="/v1/runs/{run}/queries/{id}/influences",status="200"} 5.0'
                in text
            )
            assert httpx2.get(f"http://127.0.0.1:{port}/v1/runs").status_code == 401
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[0]
    assert token not in said
    assert f":{port}" in said
