"""The batch size suits a device and is no part of what a run is."""

import pytest

from engine.memory import CPU_TOKENS
from launch import job
from tests.end_to_end.conftest import Settings, run_job


@pytest.mark.parametrize(("asked", "device", "taken"), [
    ("auto", "cpu", CPU_TOKENS), ("auto", "cuda", 131072), (400, "cpu", 400), (400, "cuda", 400),
])  # fmt: skip
def test_what_a_gpu_found_is_not_used_on_a_cpu(settings: Settings, asked, device, taken):
    from launch.config import make_config

    seen = {"token_budget": 131072, "alone": None, "parameters": ["head.weight"]}
    config = make_config(settings(gradients={"token_budget": asked}))
    assert job.gradient_spec(config, seen, device).token_budget == taken
    assert job.gradient_spec(config, seen | {"alone": "experts"}, device).token_budget == 1


def test_another_batch_size_goes_on_with_the_same_run_and_label(settings: Settings):
    first = run_job(settings(gradients={"token_budget": 40}))
    again = run_job(settings(gradients={"token_budget": 80, "coverage": 2}))
    assert again.labels == first.labels
