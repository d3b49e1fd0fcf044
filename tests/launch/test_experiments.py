"""The experiments at toy size, the runner that resumes them cell by cell, and the gates' table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.metrics import bootstrap_interval
from launch import validate
from launch.experiments import registry
from launch.experiments.registry import EXPERIMENTS, Experiment, Gate, load_experiment


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_toy_pass_ends_with_gates_and_a_report_and_no_committed_result(name: str, tmp_path: Path) -> None:
    gates = validate.validate(name, toy=True, results=tmp_path / "results", reports=tmp_path / "reports")
    folder = tmp_path / "reports" / f"{name}-toy"
    assert gates
    assert all(np.isfinite(gate["value"]) for gate in gates)
    assert all(gate["ci"] is None or gate["ci"][0] <= gate["value"] <= gate["ci"][1] for gate in gates)
    assert json.loads((folder / "report.json").read_text())["gates"] == json.loads(json.dumps(gates))
    assert (folder / "report.md").read_text().count("\n|") == len(gates) + 2
    assert not (tmp_path / "results").exists()
    if load_experiment(name).plot:
        assert list(folder.glob("*.png"))
        assert list(folder.glob("*.svg"))


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_registered_experiment_goes_by_its_name_and_lists_its_cells(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    for toy in (False, True):
        config = validate.experiment_config(name, toy)
        assert json.loads(json.dumps(config)) == config, "a finished cell would never be known again"
        cells = experiment.cells(config)
        assert cells
        assert len(set(cells)) == len(cells)
    assert "toy" not in validate.experiment_config(name, toy=True)


def test_unknown_experiment_is_refused_naming_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'tracin\.mislable' is not known: one of tracin\.mislabel, "):
        load_experiment("tracin.mislable")


class Counting:
    """An experiment of two cells that remembers what it ran, and may fail at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config: dict[str, Any] = {"size": 3}
        self.ran: list[str] = []
        self.failing = ""
        experiment = Experiment("counting", "it counts", 1, lambda config: ["a", "b"], self.run, self.gates)
        monkeypatch.setattr(validate, "load_experiment", lambda name: experiment)
        monkeypatch.setattr(validate, "experiment_config", lambda name, toy: dict(self.config))

    def run(self, config: dict[str, Any], cell: str) -> dict[str, Any]:
        assert torch.get_num_threads() == 1
        if cell == self.failing:
            raise OSError("killed")
        self.ran.append(cell)
        return {"value": config["size"]}

    def gates(self, config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
        return [Gate("sum", sum(result["value"] for result in done.values()), threshold=5.0), Gate("beside", 0.5)]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def test_killed_experiment_goes_on_with_the_cells_that_are_missing(counting: Counting, tmp_path: Path) -> None:
    counting.failing = "b"
    with pytest.raises(OSError, match="killed"):
        validate.validate("counting", results=tmp_path, reports=tmp_path / "reports")
    assert not (tmp_path / "counting.json").exists()
    counting.failing = ""
    gates = validate.validate("counting", results=tmp_path, reports=tmp_path / "reports")
    assert counting.ran == ["a", "b"]
    assert (gates[0]["value"], gates[0]["pass"]) == (6, True)
    report = json.loads((tmp_path / "counting.json").read_text())
    assert report["gates"] == gates
    assert report["cells"] == 2
    assert {"date", "commit", "seconds", "machine"} <= report.keys()
    assert sorted(f.name for f in (tmp_path / "cells" / "counting").iterdir()) == ["a.json", "b.json"]


def test_another_config_runs_every_cell_again(counting: Counting, tmp_path: Path) -> None:
    for size in (3, 3, 2):
        counting.config = {"size": size}
        gates = validate.validate("counting", results=tmp_path, reports=tmp_path / "reports")
    assert counting.ran == ["a", "b", "a", "b"]
    assert (gates[0]["value"], gates[0]["pass"]) == (4, False)


def test_gate_table_says_what_was_asked_and_what_was_only_reported() -> None:
    gates = [
        Gate("hit", 0.9, (0.85, 0.95), 0.8, paper=0.8),
        Gate("miss", 0.7, threshold=0.8),
        Gate("cost", 0.3, threshold=0.5, at_least=False),
        Gate("mean |I|", 0.6),
    ]
    assert validate.gate_table([gate.record() for gate in gates]).splitlines()[2:] == [
        "| hit | 0.900 | 0.850 – 0.950 | ≥ 0.8 | yes | 0.8 |",
        "| miss | 0.700 | – | ≥ 0.8 | **no** | – |",
        "| cost | 0.300 | – | ≤ 0.5 | yes | – |",
        r"| mean \|I\| | 0.600 | – | – | reported | – |",
    ]


def test_readme_tables_are_written_between_the_markers(counting: Counting, tmp_path: Path) -> None:
    validate.validate("counting", results=tmp_path, reports=tmp_path / "reports")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    plots = tmp_path / "plots" / "counting"
    plots.mkdir(parents=True)
    (plots / "sum.png").touch()
    validate.write_tables(tmp_path, readme, tmp_path / "results.md")
    text = readme.read_text()
    assert text.startswith("before\n<!-- results: begin -->\n| experiment | gate |")
    assert text.endswith("|\n<!-- results: end -->\nafter\n")
    assert "| `counting` | sum | 6 | – | ≥ 5 | yes | – |" in text
    assert "old" not in text
    assert "beside" not in text, "what is only reported stands in the other file"
    whole = (tmp_path / "results.md").read_text()
    assert "## counting\n\nit counts (" in whole
    assert "| beside | 0.500 | – | – | reported | – |" in whole
    assert "Pictures: [sum.png](plots/counting/sum.png)" in whole


def test_figures_have_as_many_decimals_as_help() -> None:
    values = [0.0, 1.0, 3.0, 0.25, -12.3456, 123.456, 5262.0, 12345.6, 0.00012]
    shown = ["0", "1.000", "3", "0.250", "-12.346", "123.5", "5,262", "12,346", "1.2e-04"]
    assert [validate.figure(value) for value in values] == shown


def test_interval_of_the_median_ignores_one_wild_pair() -> None:
    ratios = np.array([0.9, 0.91, 0.92, 0.93, 0.9, 0.91, 0.92, 0.93, 50.0])
    low, high = bootstrap_interval(ratios, statistic=np.median)
    assert 0.9 <= low <= np.median(ratios) <= high <= 0.93
    assert bootstrap_interval(ratios)[1] > 5


def test_registry_gate_passes_only_on_the_asked_side() -> None:
    assert registry.Gate("x", 0.8, threshold=0.8).record()["pass"] is True
    assert registry.Gate("x", 0.8, threshold=0.8, at_least=False).record()["pass"] is True
    assert registry.Gate("x", 0.81, threshold=0.8, at_least=False).record()["pass"] is False
    assert registry.Gate("x", 0.8).record()["pass"] is None


@pytest.mark.parametrize(("interval", "at_least", "passed"), [
    ((0.85, 0.91), True, True), ((0.85, 0.89), True, False), ((0.89, 0.95), False, True), ((0.91, 0.95), False, False),
])  # fmt: skip
def test_a_timing_fails_only_if_its_whole_interval_does(interval, at_least, passed) -> None:
    middle = sum(interval) / 2
    assert Gate("t", middle, interval, 0.9, at_least, timed=True).record()["pass"] is passed
    assert Gate("t", middle, interval, 0.9, at_least).record()["pass"] is ((middle >= 0.9) == at_least)
