"""Chaos at toy size; its judgement sees what it is there to see; the proxy spoils requests as it says."""

import http.client
import json
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch.experiments import chaos
from launch.experiments.chaos_run import (
    Corruption,
    Outcome,
    corrupt,
    done_units,
    make_job,
    spoiled,
    undisturbed,
    verdict,
)
from launch.experiments.chaos_trial import schedule
from launch.experiments.s3_server import KEYS, S3Server
from launch.experiments.tcp_proxy import Fault, TcpProxy
from launch.validate import experiment_config
from storage.locations import Location
from storage.verify import verify

CONFIG = experiment_config("chaos", toy=True)


def test_toy_pass() -> None:
    done = {cell: chaos.run_cell(CONFIG, cell) for cell in chaos.cells(CONFIG)}
    assert json.loads(json.dumps(done)) == done
    passed = {gate.name: gate.record()["pass"] for gate in chaos.gates(CONFIG, done)}
    assert {name for name, value in passed.items() if value is not None} >= {"faults", "rows lost or doubled"}
    assert False not in passed.values(), done
    (result,) = done.values()
    assert result["faults"] == CONFIG["cells"]["inside"]["faults"] | {"object spoiled": 2}
    assert len(result["stops"]) == 2, "the full disk and the object that was met on reading"
    (result,) = done.values()
    worse = {
        "strayed_rows": 1,
        "unnamed": ["a"],
        "differ": ["b"],
        "whole": False,
        "units_before_the_first": 0,
        "faults": {"x": 1},
    }
    failed = [gate.name for gate in chaos.gates(CONFIG, {"inside": result | worse}) if gate.record()["pass"] is False]
    assert len(failed) == 6


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A finished run, and what it left."""
    folder = tmp_path_factory.mktemp("chaos")
    return folder / "undisturbed", undisturbed(folder, make_job(folder, CONFIG))


def copy_of(run: Path, target: Path) -> Location:
    """Return a copy of a run that may be harmed."""
    source, copy = Location.parse(str(run)), Location.parse(str(target))
    for key in source.list():
        copy.create(key, source.read(key))
    return copy


def lose_a_unit(run: Location) -> None:
    run.delete(next(key for key in done_units(run) if "collect-" in key))


def do_a_unit_twice(run: Location) -> None:
    key = next(key for key in done_units(run) if "score-" in key)
    run.create(key.replace("done.0", "done.1"), run.read(key))


@pytest.mark.parametrize("harm", [lose_a_unit, do_a_unit_twice])
def test_rows_lost_or_doubled_are_seen(
    left: tuple[Path, Outcome], tmp_path: Path, harm: Callable[[Location], None]
) -> None:
    run = copy_of(left[0], tmp_path / "copy")
    assert verdict(run, left[1]) == {"objects": len(left[1].objects), "differ": [], "strayed_rows": 0}
    harm(run)
    assert verdict(run, left[1])["strayed_rows"] == CONFIG["shard_rows"]


def test_every_row_is_counted_once_by_each_stage_and_by_the_index(left: tuple[Path, Outcome]) -> None:
    rows = left[1].rows
    assert set(rows.values()) == {1}
    assert {row for _, row in rows} == set(range(CONFIG["rows"]))
    assert len({what for what, _ in rows}) == 1 + CONFIG["checkpoints"] + 1


def test_spoiled_objects_are_seen_and_named_only_if_somebody_does(left: tuple[Path, Outcome], tmp_path: Path) -> None:
    run = copy_of(left[0], tmp_path / "copy")
    draw = random.Random(0)
    taken: list[Corruption] = []
    for _ in range(4):
        taken.append(corrupt(run, draw, taken))
    assert len({one.unit + one.stage for one in taken}) == 4
    changed = sorted(one.key for one in taken if one.key.startswith(("gradients", "scores", "index")))
    assert changed
    assert verdict(run, left[1])["differ"] == changed
    damages = [{"key": one.key, "unit": one.unit} for one in verify(run).damages]
    assert all(one.is_named("", damages) for one in taken)
    first = taken[0]
    assert first.is_named(f"rows are damaged. It is of unit {first.unit} of stage {first.stage}. Run again", [])
    assert not first.is_named(
        f"done: unit {first.unit} of stage {first.stage}.", [{"key": first.key, "unit": "another"}]
    )


def test_spoiled_bytes_are_shorter_or_differ_in_one_bit() -> None:
    data, draw = bytes(range(50)), random.Random(0)
    found = [spoiled(data, draw) for _ in range(40)]
    short = [one for one in found if len(one) < len(data)]
    flipped = [one for one in found if len(one) == len(data)]
    assert all(data.startswith(one) for one in short)
    assert {sum((a ^ b).bit_count() for a, b in zip(one, data, strict=True)) for one in flipped} == {1}
    assert len(short) > 10
    assert len(flipped) > 10


def test_schedule_spreads_every_fault_and_is_drawn_from_its_name(left: tuple[Path, Outcome]) -> None:
    units = [f"collect-train/{i}" for i in range(60)] + [f"score-chaos/{i}" for i in range(20)] + ["index-chaos/tables"]
    faults = {"worker killed": 6, "driver killed": 3}
    plan = schedule(faults, units, random.Random("a"))
    assert plan == schedule(faults, units, random.Random("a")) != schedule(faults, units, random.Random("b"))
    assert sorted(kind for _, kind in plan) == ["driver killed"] * 3 + ["worker killed"] * 6
    assert [at for at, _ in plan] == sorted(at for at, _ in plan)
    assert 1 <= plan[0][0] < plan[-2][0] < 60
    assert plan[-1] == (80, "driver killed"), "once all units are done"


def test_a_cell_that_a_machine_does_not_allow_is_skipped_or_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Any:
        raise chaos.Skipped("needs root")

    monkeypatch.setitem(chaos.PLACES, "small disk", refuse)
    monkeypatch.setattr(chaos, "run_inside", lambda config, cell: {"place": config["place"]})
    config = experiment_config("chaos", toy=False)
    assert chaos.run_cell(config, "disk") == {"place": "inside", "skipped": "needs root"}
    monkeypatch.setitem(chaos.PLACES, "two hosts", refuse)
    skipped = {"hosts": chaos.run_cell(config, "hosts")}
    gates = {gate.name: gate.value for gate in chaos.gates(config, skipped)}
    assert (gates["cells skipped"], gates["faults"]) == (1, 0)


class Echo(BaseHTTPRequestHandler):
    """Answers every PUT with its body, and keeps it."""

    protocol_version = "HTTP/1.1"
    received: list[bytes]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append(body)
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def echo() -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server, and what it has received."""
    received: list[bytes] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnEcho", (Echo,), {"received": received}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, received
    server.shutdown()
    thread.join()
    server.server_close()


def put(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, bytes] | None:
    """Return status and body of an answer, None if the connection broke."""
    try:
        connection.request("PUT", "/", body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "answer", "arrives"),
    [("reset", None, False), ("busy", (503, b""), False), ("lost", None, True), ("cut", None, True)],
)
def test_proxy_spoils_the_next_request_and_no_other(
    echo: tuple[int, list[bytes]], fault: Fault, answer: tuple[int, bytes] | None, arrives: bool
) -> None:
    port, received = echo
    with TcpProxy(port) as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
        large = bytes(300_000)
        assert put(connection, large) == (200, large)
        proxy.spoil(fault)
        assert put(connection, b"spoiled") == answer
        assert put(connection, b"after") == (200, b"after")
        assert proxy.spoiled == 1
    assert received == [large, *([b"spoiled"] if arrives else []), b"after"]


def test_proxy_refuses_while_the_server_is_gone_and_counts_it() -> None:
    with TcpProxy(1) as proxy:
        assert put(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10), b"x") is None
        assert proxy.refused == 1


@pytest.mark.cluster
def test_a_killed_server_has_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = S3Server(tmp_path)
    for name, value in {"AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": "us-east-1", **KEYS}.items():
        monkeypatch.setenv(name, value)
    place = Location.parse("s3://first/some")
    try:
        server.start()
        place.create("key", b"value")
        server.kill()
        server.start()
        assert place.read("key") == b"value"
    finally:
        server.stop()


@pytest.mark.cluster
def test_a_short_chaos_on_a_real_server() -> None:
    faults = {
        "worker killed": 1, "driver killed": 1, "server killed": 1, "connection reset": 1, "answer lost": 1,
        "answer cut off": 1, "answered 503": 1,
    }  # fmt: skip
    config = CONFIG | {"rows": 96, "pace": 0.3, "cells": {"short": {"place": "s3", "faults": faults}}}
    result = chaos.run_cell(config, "short")
    assert result["faults"] == faults | {"object spoiled": 1}
    assert result["units_before_the_first"] >= 1
    judged = {key: result[key] for key in ("unnamed", "differ", "strayed_rows", "whole")}
    assert judged == {"unnamed": [], "differ": [], "strayed_rows": 0, "whole": True}, result
