"""The two units that a worker has under way: one reads or writes while the other computes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from actors import collect
from actors.specs import GradientSpec
from actors.units import Unit
from actors.worker import Worker
from engine.projection import Projection

SETTINGS = {"model": None, "gradients": GradientSpec((), Projection(), False, 8)}


class Store:
    """A slow store: the first unit's write ends once the second has computed."""

    def __init__(self, computed: threading.Event) -> None:
        self.computed, self.overlapped = computed, list[bool]()

    def write(self, set_name: str, checkpoint: str, segment: str, start: int, shard: object) -> list:
        self.overlapped.append(self.computed.wait(5))
        return []


@pytest.fixture
def worker(monkeypatch, tmp_path):
    worker, second = Worker(str(tmp_path), "cpu"), threading.Event()
    store, inside = Store(second), list[int]()

    def compute(hooks, task, rows, spec, device, erased):
        inside.append(1)
        assert len(inside) == 1  # never two at once
        if rows[0]["start"] == 1:
            second.set()
        inside.pop()
        return None, {}

    monkeypatch.setattr(collect, "shard_gradients", compute)
    fakes = {
        "rows": lambda home, name, at: [{"length": 1, "start": at["start"]}], "gradients": lambda *_: None,
        "task": lambda _: None, "store": lambda _: store, "ids": lambda *_: np.arange(1),
        "erased": lambda *_: np.zeros(1, dtype=bool),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(worker.context, name, fake)
    return SimpleNamespace(run=worker.run, store=store, context=worker.context)


def unit(start: int) -> Unit:
    return Unit(f"u{start}", {"set": "train", "checkpoint": "c", "segment": "000000.0", "start": start})


def test_a_unit_computes_while_the_one_before_writes(worker):
    with ThreadPoolExecutor(2) as threads:
        receipts = list(threads.map(lambda start: worker.run("collect", SETTINGS, unit(start)), (0, 1)))
    assert [receipt.unit for receipt in receipts] == ["u0", "u1"]
    assert worker.store.overlapped == [True, True]


def test_other_units_wait_for_their_turn(worker, monkeypatch):
    seen = []
    monkeypatch.setitem(
        __import__("actors.worker").worker.UNIT_FUNCTIONS,
        "score",
        lambda context, *_: seen.append(context.computing.locked()),
    )
    with pytest.raises(TypeError):  # it returns no receipt
        worker.run("score", SETTINGS, unit(0))
    assert seen == [True]
    assert not worker.context.computing.locked()
