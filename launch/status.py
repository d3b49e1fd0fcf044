"""How far a run is, how it does, and with --verify whether all that it holds is still there, byte for byte.

python launch/status.py RUN               stages, units, rows, the driver, what went wrong
python launch/status.py RUN --verify      reads every object again; names what is missing, truncated or altered

What --verify finds is noted in the run: the same score.py command then makes it anew. Exit status: 0 healthy, 1 damaged,
2 not looked at (a wrong command, no such run, storage that does not answer).
"""

from launch.command import run_command  # isort: split

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from actors.overview import RunWatch, StageState, altered_records, drivers, feature_set, health, stages
from storage.locations import Location
from storage.run_format import check_format
from storage.verify import Damage, verify

SHOWN = 50  # damages that a person is shown


def status(run: Location, check: bool) -> dict[str, Any]:
    """Return what `--json` prints. FileNotFoundError for a place without a run."""
    found = stages(run, detail=True)
    if not found and not run.exists("manifest.json"):
        raise FileNotFoundError(f"{run.uri} holds no run: check the path")
    check_format(run)
    report: dict[str, Any] = {
        "run": run.uri,
        "state": RunWatch(run).read()["state"],
        "drivers": [{k: one.get(k) for k in ("driver", "host", "pid", "time", "gone")} for one in drivers(run)],
        "stages": [asdict(stage) for stage in found],
        "health": health(run),
        "verified": None,
    }
    if check:
        verdict = verify(run)
        damages = [Damage(key, what) for key, what in altered_records(run).items()] + verdict.damages
        report["verified"] = {
            "objects": verdict.objects, "bytes": verdict.bytes, "damages": [asdict(one) for one in damages]
        }  # fmt: skip
    waiting = sum(stage.damaged for stage in found)
    report["healthy"] = not waiting and not (report["verified"] or {}).get("damages")
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report for a person."""
    console.print(f"{report['run']}: {report['state']}", highlight=False)
    for one in report["drivers"]:
        console.print(driver_line(one), highlight=False, soft_wrap=True)
    table = Table("stage", "units", "rows", "bad rows", "last unit", box=None, pad_edge=False)
    for stage in (StageState(**one) for one in report["stages"]):
        units = f"{stage.done:,} of {stage.units:,}" + (f", {stage.damaged:,} damaged" if stage.damaged else "")
        table.add_row(plain_name(stage.stage), units, f"{stage.rows:,}", f"{stage.bad or 0:,}", ago(stage.age))
    console.print(table)
    for kind, count in report["health"]["events"].items():
        console.print(f"{count:,} {kind}")
    verified = report["verified"]
    if verified:
        console.print(f"{verified['objects']:,} objects read, {verified['bytes'] / 1e6:,.1f} MB")
        for one in verified["damages"][:SHOWN]:
            console.print(f"damaged: {Damage(**one)}", highlight=False, soft_wrap=True)
        if len(verified["damages"]) > SHOWN:
            console.print(f"… and {len(verified['damages']) - SHOWN:,} more: --json lists all")
    if not report["healthy"]:
        console.print("run the same launch/score.py command again: units named above are made anew", soft_wrap=True)


def plain_name(stage: str) -> str:
    """Return a stage's name without the hash that tells features of one set apart."""
    return f"features-{feature_set(stage)}" if stage.startswith("features-") else stage


def driver_line(driver: dict[str, Any]) -> str:
    """Return who works on the run, and since when nothing was heard of them."""
    gone = ", which is gone" if driver["gone"] else ""
    heard = "" if driver["time"] is None else f", last sign of life {ago(time.time() - driver['time'])}"
    return f"driver {driver['driver']} (process {driver['pid']} on {driver['host']}{gone}){heard}"


def ago(seconds: float | None) -> str:
    """Return a time span in words, – for none."""
    if seconds is None:
        return "–"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def main(
    run: Annotated[str, typer.Argument(help="folder or s3:// prefix of a run")],
    check: Annotated[bool, typer.Option("--verify", help="read every object and compare it with its record")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print how far a run is and how it does."""
    try:
        report = status(Location.parse(run), check)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(report, Console())
    sys.exit(0 if report["healthy"] else 1)


if __name__ == "__main__":
    run_command(main)
