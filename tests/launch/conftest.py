"""The tiny job of the end-to-end tests, and one run of it that all tests of a folder only read."""

from pathlib import Path

import pytest

from launch.run import Run
from tests.end_to_end.conftest import inputs, run_job, settings, tiny_job

__all__ = ["inputs", "settings"]  # fixtures, found by name


@pytest.fixture(scope="session")
def scored(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two labels of scores: `first` of TracIn, `second` of the dot product."""
    place = tmp_path_factory.mktemp("scored") / "run"
    head = {"modules": ["classifier"]}
    run_job(tiny_job(inputs, place, gradients=head, output={"label": "first"}))
    return run_job(tiny_job(inputs, place, gradients=head, output={"label": "second"}, method={"name": "gradient-dot"}))


@pytest.fixture(scope="session")
def served(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run for the service: `first` of TracIn, `second` of the dot product, `offline` made without a store."""
    place, head = tmp_path_factory.mktemp("served") / "tiny" / "run", {"modules": ["classifier"]}
    run_job(tiny_job(inputs, place, gradients=head, output={"label": "first"}))
    run_job(tiny_job(inputs, place, gradients=head, output={"label": "second"}, method={"name": "gradient-dot"}))
    return run_job(tiny_job(inputs, place, gradients=head | {"store": False}, output={"label": "offline"}))
