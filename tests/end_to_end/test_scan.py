"""The exact scan for new queries gives what scoring the stored rows gives, and names what is damaged as that does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors import scan as scanning
from actors.scan import product_part, scan
from actors.score import add_up, state_block
from engine.topk import TopK
from launch.online import Setting, prepare_records
from launch.run import Run
from storage.damage import DamagedObject
from storage.gradients import GradientStore
from storage.locations import Buffer
from tests.conftest import Caught
from tests.end_to_end.conftest import ROWS, Settings, run_job, sentence

ASKED = [{"text": sentence(seed), "label": seed % 3} for seed in (2000, 2001, 2002)]
FORMS = {
    "float16": {}, "float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}, "without norms": {"norms": False},
    "compressed": {"compression": "blosc-lz4"},
    "unprojected": {"projection": "none", "modules": ["classifier*", "*attention*"]},
}  # fmt: skip


@pytest.fixture(params=list(FORMS))
def run(request: pytest.FixtureRequest, settings: Settings) -> Run:
    return run_job(settings(gradients=FORMS[request.param], output={"top_k": 20}))


def slow(setting: Setting, states: dict[str, Any], k: int) -> np.ndarray:
    """Return every score [N, Q], rows read through zarr, one shard after another."""
    found = []
    for start in range(0, ROWS, 16):
        at = {"segment": "000000.0", "start": start, "stop": min(start + 16, ROWS)}
        ids = np.arange(at["start"], at["stop"])
        parts = (
            state_block(setting.context, setting.score, setting.gradients, at, ids, n, [s], s.weight, len(s.losses))
            for n, s in states.items()
        )
        found.append(add_up(ids, parts, replace(setting.score, top_k=k, dense=True)).dense)
    return np.concatenate(found)


def fast(setting: Setting, states: dict[str, Any], k: int, **more: Any) -> TopK:
    return scan(
        setting.context, setting.method, setting.score, setting.gradients, setting.corpus, 16, states, k, **more
    )


def test_the_scan_ranks_as_a_full_sort_of_the_stored_rows_scores(run: Run, caught: Caught) -> None:
    setting = run.setting()
    states = prepare_records(setting, ASKED)
    scores = slow(setting, states, 9)
    order = np.argsort(-scores, 0, kind="stable")

    def compare() -> None:
        top = fast(setting, states, 9)
        for side, chosen in enumerate((order[:9], order[::-1][:9])):
            expected = np.take_along_axis(scores, chosen, 0).T
            np.testing.assert_allclose(top.scores[side], expected, rtol=1e-4, atol=1e-6 * np.abs(scores).max())
            found = np.take_along_axis(scores, top.ids[side].T, 0).T
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(scores).max())

    compare()
    if scanning._is_plain(setting.context, setting.score):
        whole = GradientStore.vectors
        drop = {"row_scale": lambda v: v * 2, "losses": lambda v: v, "state": lambda v: v, "norms": lambda v: v}
        if GradientStore.open(run.location).settings.dtype == "float16":
            caught(
                compare, GradientStore, "vectors",
                lambda *args: {name: drop[name](value) for name, value in whole(*args).items()},
            )  # fmt: skip


def test_threads_and_erased_examples(settings: Settings) -> None:
    setting = run_job(settings()).setting()
    states = prepare_records(setting, ASKED)
    one, many = (fast(setting, states, 9, threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one.ids, many.ids)
    np.testing.assert_array_equal(one.scores, many.scores)
    gone = int(one.ids[0, 0, 0])
    assert gone not in fast(setting, states, 9, erased=[gone]).ids


@pytest.mark.parametrize("what", ["flipped", "missing", "state"])
def test_a_damaged_shard_is_named(settings: Settings, what: str) -> None:
    run = run_job(settings())
    key = f"gradients/train/checkpoint-20/000000.0/{'state/c/1' if what == 'state' else 'rows/c/1/0'}"
    data = bytearray(run.location.read(key))
    data[7] ^= 1
    if what == "missing":
        run.location.delete(key)
    else:
        run.location.replace(key, bytes(data))
    setting = run.setting()
    with pytest.raises(DamagedObject, match=r"000000\.0"):
        fast(setting, prepare_records(setting, ASKED), 5)


def test_the_scan_does_not_take_the_slow_way(settings: Settings) -> None:
    setting = run_job(settings()).setting()
    state = prepare_records(setting, ASKED)["checkpoint-20"]
    at = {"segment": "000000.0", "start": 32, "stop": ROWS}
    part = product_part(
        setting.context, setting.method, setting.score, setting.gradients, at, np.arange(32, ROWS), "checkpoint-20", state,
        Buffer(),
    )  # fmt: skip
    assert part is not None
    assert next(part.blocks).scores.shape == (ROWS - 32, 3)


def test_the_index_agrees_with_the_scan_of_its_own_queries(settings: Settings) -> None:
    run = run_job(settings(output={"top_k": 10}))
    setting = run.setting()
    states = dict(zip(setting.score.checkpoints, run.states(), strict=True))
    top = fast(setting, states, 10)
    table = run.top(3, k=10)
    stored = [row["score"] for row in table.to_pylist() if row["side"] == "proponent"]
    np.testing.assert_allclose(top.scores[0, 3, : len(stored)], stored, rtol=1e-4, atol=1e-7)
