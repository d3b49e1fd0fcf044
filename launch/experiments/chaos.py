"""chaos: whatever is killed, hung, cut off, spoiled or filled on the way, a run ends as an undisturbed one does.

A cell is one run with many faults, in an order drawn from its name: each comes when the run's journal has grown so far,
the first after a unit was done. A driver that stops by itself is started again by the same command. In the end some
finished objects are spoiled too, `launch/status.py RUN --verify` names what is damaged, and the command makes it anew.
Then every byte of gradients, scores and index is compared with those of a run that nothing happened to.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from launch.config import make_config
from launch.experiments.chaos_hosts import on_two_hosts
from launch.experiments.chaos_inside import run_inside
from launch.experiments.chaos_places import in_folder, on_a_head, on_nodes, on_s3, on_small_disk
from launch.experiments.chaos_run import make_job, undisturbed, verdict
from launch.experiments.chaos_trial import Place, Skipped, Trial, schedule, spoil_object
from launch.experiments.registry import Experiment, Gate
from launch.job import score

PLACES: dict[str, Callable[[Path], AbstractContextManager[Place]]] = {
    "folder": in_folder,
    "head": on_a_head,
    "small disk": on_small_disk,
    "s3": on_s3,
    "nodes": on_nodes,
    "two hosts": on_two_hosts,
}


def cells(config: dict[str, Any]) -> list[str]:
    return list(config["cells"])


def run_cell(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Return the faults that happened, by kind, and how the run ended."""
    of_cell = config | config["cells"][cell]
    try:
        return run_trial(of_cell, cell) if of_cell["place"] != "inside" else run_inside(of_cell, cell)
    except Skipped as reason:
        if instead := of_cell.get("instead"):
            return run_inside(of_cell | instead, cell) | {"skipped": str(reason)}
        return {"faults": {}, "skipped": str(reason)}


def run_trial(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Carry out a cell's faults on a run of its own; return what came of it."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, PLACES[config["place"]](Path(name)) as place:
        folder = Path(name)
        job = make_job(folder, config)
        expected = undisturbed(folder, job)
        with Trial(folder, place, job, cell, config["pace"]) as trial:
            counts, before = trial.carry_out(schedule(config["faults"], expected.records, trial.random))
            trial.finish()
            for _ in range(config["spoiled_at_rest"]):
                spoil_object(trial)
            trial.verify()
            score(make_config(job | {"run": place.run.uri, "cluster": {"backend": "in-process"}}), lambda _: None)
            whole = trial.verify()
            return {
                "faults": {**counts, "object spoiled": len(trial.corruptions)},
                "units_before_the_first": before,
                "stops": [" ".join(stop.replace(name, "").split())[:200] for stop in trial.stops],
                "unnamed": trial.unnamed(),
                "whole": whole,
                **verdict(place.run, expected),
            }


def gates(config: dict[str, Any], done: dict[str, dict[str, Any]]) -> list[Gate]:
    ran = [result for result in done.values() if result["faults"]]
    counts: Counter[str] = Counter()
    for result in ran:
        counts.update(result["faults"])
    counts["requests spoiled"] = sum(counts[kind] for kind in config["request_faults"])
    asked: dict[str, int] = config["asked"]
    total = sum(sum(result["faults"].values()) for result in ran)
    none = {
        "rows lost or doubled": sum(result["strayed_rows"] for result in ran),
        "corruptions unnamed": sum(len(result["unnamed"]) for result in ran),
        "objects that differ from an undisturbed run's": sum(len(result["differ"]) for result in ran),
        "runs that are not whole in the end": sum(not result["whole"] for result in ran),
        "runs hit before a unit was done": sum(not result["units_before_the_first"] for result in ran),
    }
    return [
        Gate("faults", total, threshold=asked["faults"]),
        *(Gate(name, value, threshold=0, at_least=False) for name, value in none.items()),
        *(Gate(kind, counts[kind], threshold=asked.get(kind)) for kind in sorted(counts)),
        Gate("objects compared", sum(result["objects"] for result in ran)),
        Gate("drivers that stopped by themselves", sum(len(result["stops"]) for result in ran)),
        Gate("cells skipped", sum("skipped" in result for result in done.values())),
    ]


EXPERIMENT = Experiment(
    "chaos", "whatever fails on the way, a run ends with the rows, scores and index of an undisturbed one",
    30, cells, run_cell, gates,
)  # fmt: skip
