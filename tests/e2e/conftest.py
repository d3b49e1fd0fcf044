"""Runs made by the real job, a service over them and a browser. Everything here is marked `e2e` (make e2e)."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright

from engine.models import save_checkpoint
from launch.run import Run
from launch.service.catalog import Catalog, RunView
from tests.conftest import randomise
from tests.e2e.browsing import Visitor, launch, serving
from tests.end_to_end.conftest import inputs, run_job, tiny_job, write_texts
from tests.engine.test_image_classification import FACTORY, pixels_to_classes

__all__ = ["inputs"]  # a fixture, found by name
TRAIN, QUERIES = 80, 60
HOSTILE = '<img src=x onerror="stolen=1"> {{7*7}} ${7*7} `</script><script>stolen=1</script> dull film'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e/" in item.nodeid:
            item.add_marker(pytest.mark.e2e)


def write_hostile(path: Path, count: int, first: int = 0) -> Path:
    """Write texts as the tiny job has them, the fourth of which tries to become part of the page."""
    write_texts(path, count, first)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["text"] = HOSTILE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: texts (finished), pictures (finished), unborn (no job yet)."""
    place = tmp_path_factory.mktemp("runs")
    text = {
        "corpus": str(write_hostile(place / "train.jsonl", TRAIN)),
        "queries": {"name": "asked", "path": str(write_hostile(place / "queries.jsonl", QUERIES, first=1000))},
    }
    run_job(tiny_job(inputs, place / "texts", **text))
    dot = {"method": {"name": "gradient-dot"}, "output": {"label": "second"}}
    run_job(tiny_job(inputs, place / "texts", **text, **dot))
    picture_run(place)
    (place / "unborn").mkdir()
    return place


def picture_run(place: Path) -> Run:
    """Score images of three classes, three pixels by four."""
    save_checkpoint(randomise(pixels_to_classes()), place / "model")
    for name, count, seed in (("seen", 30, 0), ("asked", 6, 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 4), dtype=np.uint8)
        np.savez(place / f"{name}.npz", images=pixels, labels=np.arange(count) % 3)
    return run_job(
        {
            "run": str(place / "pictures"),
            "task": {"name": "image-classification", "settings": {"factory": FACTORY, "classes": 3}},
            "checkpoints": [{"path": str(place / "model"), "learning_rate": 0.1}],
            "corpus": str(place / "seen.npz"),
            "queries": {"name": "asked", "path": str(place / "asked.npz")},
            "gradients": {"modules": ["*"], "coverage": 0, "shard_rows": 16},
            "cluster": {"backend": "in-process"},
            "output": {"top_k": 10, "label": "scores"},
        }
    )


@pytest.fixture(scope="session")
def texts(runs: Path) -> RunView:
    """What the page must show of the text run, read without it."""
    return Catalog([str(runs / "texts")]).run("texts")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = launch(playwright)
        yield found
        found.close()


@pytest.fixture(scope="session")
def service(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service over all runs, open to everyone on this machine."""
    log = tmp_path_factory.mktemp("service") / "log"
    with serving(log, *(str(runs / name) for name in ("texts", "pictures", "unborn"))) as url:
        yield url


@pytest.fixture
def visitor(browser: Browser, service: str) -> Iterator[Visitor]:
    """A reader of that service; afterwards nothing may have gone wrong in their windows."""
    reader = Visitor(browser, service)
    yield reader
    reader.leave()


def half_done(run: Path, half: Path, label: str = "scores") -> None:
    """Copy a run as it was in the middle of scoring: one shard's scores done, no index."""
    shutil.copytree(run, half)
    shutil.rmtree(half / "index" / label)
    for unit in sorted((half / "journal" / f"score-{label}").iterdir())[1:]:
        shutil.rmtree(unit)
