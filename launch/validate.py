"""Run an experiment and judge its gates.

    python launch/validate.py NAME [--toy] [--json]      run, resuming cell by cell
    python launch/validate.py --list                     all experiments with their cost
    python launch/validate.py --tables                   write docs/results.md and the README's table from the committed results

Finished cells lie in tests/benchmarks/results/cells/NAME/, the result in tests/benchmarks/results/NAME.json; report.md and
plots go to runs/validate/NAME/ (a toy pass: NAME-toy/, its cells too), the pictures of a full-size pass also to
tests/benchmarks/results/plots/NAME/.
"""

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
import yaml

from launch.command import run_command
from launch.experiments.registry import EXPERIMENTS, Experiment, load_experiment
from launch.messages import plain_errors

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results"
REPORTS = ROOT / "runs" / "validate"
COLUMNS = "gate | value | 95 % interval | asked | passed | paper"
WRITTEN = "By `python launch/validate.py --tables` from the files in `tests/benchmarks/results`. Minutes: of all cells."
KEPT = (".png", ".md", ".json")  # of what an experiment draws


def validate(name: str, toy: bool = False, results: Path = RESULTS, reports: Path = REPORTS) -> list[dict[str, Any]]:
    """Run what is missing of an experiment, write its result and report, and return its gates.

    A toy pass uses the config's `toy` values and leaves no committed result.
    """
    experiment = load_experiment(name)
    config = experiment_config(name, toy)
    folder = reports / (f"{name}-toy" if toy else name)
    cells_folder = folder / "cells" if toy else results / "cells" / name
    records = {cell: _cell(experiment, config, cell, cells_folder) for cell in experiment.cells(config)}
    done = {cell: record["result"] for cell, record in records.items()}
    gates = [gate.record() for gate in experiment.gates(config, done)]
    report = {"name": name, "claim": experiment.claim, "config": config, "gates": gates, **circumstances(records)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(f"# {name}\n\n{experiment.claim}\n\n{gate_table(gates)}\n")
    if experiment.plot:
        experiment.plot(config, done, str(folder))
    if not toy:
        (results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        _keep_plots(folder, results / "plots" / name)
    return gates


def _keep_plots(folder: Path, kept: Path) -> None:
    """Copy a full-size pass's pictures, and what they are explained by, to where they are committed."""
    shutil.rmtree(kept, ignore_errors=True)
    for file in (one for one in folder.iterdir() if one.suffix in KEPT and one.stem != "report"):
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, kept)


def experiment_config(name: str, toy: bool) -> dict[str, Any]:
    """Return configs/validate/NAME.yaml, with its `toy` section laid over it for a toy pass."""
    data = yaml.safe_load((ROOT / "configs" / "validate" / f"{name}.yaml").read_text())
    small = data.pop("toy", {})
    return data | small if toy else data


def _cell(experiment: Experiment, config: dict[str, Any], cell: str, folder: Path) -> dict[str, Any]:
    """Return a cell's config, seconds and result: what is on disk if it was made with the same config, else run it.

    A cell runs on one thread, as a CPU worker does, and its file appears whole or not at all.
    """
    file = folder / f"{cell}.json"
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["config"] == config:
            return stored
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        result = experiment.run(config, cell)
    finally:
        torch.set_num_threads(threads)
    record = {"config": config, "seconds": round(time.perf_counter() - began, 1), "result": result}
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, allow_nan=False) + "\n")
    part.replace(file)
    return record


def circumstances(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return date, commit, seconds of all cells and machine size of a result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "cells": len(records),
        "seconds": round(sum(record["seconds"] for record in records.values())),
        "machine": {
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "architecture": platform.machine(),
        },
    }


def gate_table(gates: list[dict[str, Any]]) -> str:
    """Return the gates as a Markdown table."""
    return "\n".join([f"| {COLUMNS} |", "|---" * 6 + "|", *(f"| {gate_line(gate)} |" for gate in gates)])


def gate_line(gate: dict[str, Any]) -> str:
    """Return the cells of one gate's line, without the outer bars."""
    asked = "–" if gate["threshold"] is None else f"{'≥' if gate['at_least'] else '≤'} {gate['threshold']:g}"
    passed = {True: "yes", False: "**no**", None: "reported"}[gate["pass"]]
    interval = "–" if gate["ci"] is None else " – ".join(figure(end) for end in gate["ci"])
    paper = "–" if gate["paper"] is None else f"{gate['paper']:g}"
    return " | ".join([gate["name"].replace("|", "\\|"), figure(gate["value"]), interval, asked, passed, paper])


def figure(value: float) -> str:
    """Return a number as tables show it: three decimals, fewer of large ones, whole numbers whole."""
    if abs(value) >= 1000 or (value == round(value) and abs(value) != 1):
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.{1 if abs(value) >= 100 else 3}f}"


def write_tables(
    results: Path = RESULTS, readme: Path = ROOT / "README.md", whole: Path = ROOT / "docs/results.md"
) -> None:
    """Write all committed results to one file, and those that are judged or have a paper's figure into the README."""
    reports = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    parts = [
        f"## {report['name']}\n\n{report['claim']} ({_circumstances(report)})\n\n{gate_table(report['gates'])}"
        f"{_plot_links(results / 'plots' / report['name'], whole.parent)}"
        for report in reports
    ]
    whole.write_text(f"# Results\n\n{WRITTEN}\n\n" + "\n\n".join(parts) + "\n")
    lines = [f"| experiment | {COLUMNS} |", "|---" * 7 + "|"]
    for report in reports:
        told = [gate for gate in report["gates"] if gate["threshold"] is not None or gate["paper"] is not None]
        names = [f"`{report['name']}`", *[""] * len(told)]
        lines += [f"| {name} | {gate_line(gate)} |" for name, gate in zip(names, told, strict=False)]
    block = "<!-- results: begin -->\n" + "\n".join(lines) + "\n<!-- results: end -->"
    text = readme.read_text()
    readme.write_text(re.sub(r"<!-- results: begin -->.*<!-- results: end -->", lambda _: block, text, flags=re.S))


def _circumstances(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"{report['date']}, commit {report['commit']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{report['seconds'] / 60:.0f} min"
    )


def _plot_links(folder: Path, page: Path) -> str:
    links = [f"[{file.name}]({os.path.relpath(file, page)})" for file in sorted(folder.glob("*"))]
    return f"\n\nPictures: {', '.join(links)}" if links else ""


def main(
    name: Annotated[str, typer.Argument(help="an experiment, or all")] = "",
    toy: Annotated[bool, typer.Option(help="the smallest size, for tests")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the gates as JSON")] = False,
    show: Annotated[bool, typer.Option("--list", help="list the experiments with their cost")] = False,
    tables: Annotated[bool, typer.Option(help="write docs/results.md and the README's table")] = False,
) -> None:
    """Run one experiment, or all of them."""
    with plain_errors():
        if show:
            for known in EXPERIMENTS:
                experiment = load_experiment(known)
                print(f"{known:<22} about {experiment.minutes:g} min   {experiment.claim}")
        elif tables:
            write_tables()
        elif not name:
            raise ValueError(f"NAME is missing: one of {', '.join(EXPERIMENTS)}, or all")
        else:
            for one in list(EXPERIMENTS) if name == "all" else [name]:
                gates = validate(one, toy)
                print(json.dumps(gates, indent=1) if as_json else f"{one}\n{gate_table(gates)}")


if __name__ == "__main__":
    run_command(main)
