"""What a job will take before it is started: units, bytes, memory, time by number and kind of devices.

python launch/plan.py CONFIG [section.key=value …] [--json]

One small probe is measured on this machine (some batches under the first and the last checkpoint, all stages), on a GPU if
there is one. Where `plan.model` gives a model's shape nothing is loaded or measured: the figures of devices in
configs/cluster/devices.yaml are all that is used, without a GPU or network. What cannot fit is refused. Exit status: 0, or 1
with what is wrong.
"""

from launch.command import find_modules_here, run_command  # isort: split

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from actors.progress import duration
from actors.progress import size as in_units
from engine.methods.contract import load_method
from launch.config import Config, load_config
from launch.forecast import Plan, plan_by_probe, plan_by_shape
from launch.messages import plain_errors


def plan(config: Config) -> Plan:
    """Return what a job will take. Raises ValueError for one that cannot fit, naming the ways out."""
    if config.queries is None:
        raise ValueError("queries is missing: say which predictions are asked about, for example queries: test.jsonl")
    if config.pretrain:
        raise ValueError(
            "plan does not know jobs of two stages: run one with pretrain.corpus.limit=1000; the solves take what they take, "
            "the rest grows with the rows."
        )
    method = load_method(config.method.name, config.method.settings())
    made = plan_by_shape(config, method) if config.plan.model else plan_by_probe(config, method)
    refuse_unfit(config, made)
    return made


def refuse_unfit(config: Config, made: Plan) -> None:
    """Raise ValueError for a job that cannot fit, with the value, the limit and the ways out."""
    if not any(one.fits for one in made.times):
        largest = max(made.times, key=lambda one: one.limit)
        raise ValueError(
            f"a worker needs {in_units(largest.memory)}, the largest device ({largest.device}) has "
            f"{in_units(largest.limit)}: set gradients.compute=bfloat16, a smaller gradients.token_budget or "
            f"gradients.shard_rows, fewer workers, or name a larger device in plan.devices. A worker keeps its model on one "
            f"device."
        )
    needed = sum(made.bytes.values()) + made.temporary
    if "://" in config.run.uri:
        return
    folder = next(
        one for one in [Path(config.run.uri).absolute(), *Path(config.run.uri).absolute().parents] if one.exists()
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"run.uri={config.run.uri} will hold {in_units(needed)}, {folder} has {in_units(free)} free: set a smaller "
            f"gradients.dim, fewer gradients.modules, gradients.store=false, fewer checkpoints (checkpoints.choose), or "
            f"another place such as s3://."
        )


def show(made: Plan, console: Console) -> None:
    """Print a plan for a person."""
    size = made.size
    console.print(
        f"{size.rows:,} examples of {size.tokens:,} tokens, {size.queries:,} queries, {size.checkpoints} checkpoints; "
        f"{size.shard_rows:,} rows a shard", soft_wrap=True,
    )  # fmt: skip
    console.print("units: " + ", ".join(f"{count:,} of {stage}" for stage, count in made.units.items()))
    parts = ", ".join(f"{in_units(count)} {kind}" for kind, count in made.bytes.items() if count)
    console.print(f"bytes: {in_units(sum(made.bytes.values()))} ({parts})", soft_wrap=True)
    if made.temporary:
        console.print(f"besides, until the index stands: {in_units(made.temporary)}")
    table = Table(
        "device", "workers", "time", "device-hours", "memory a worker", "most of it", box=None, pad_edge=False
    )
    for one in made.times:
        longest = max(one.seconds, key=lambda part: one.seconds[part])
        memory = in_units(one.memory) + ("" if one.fits else f", has {in_units(one.limit)}: does not fit")
        hours = f"{one.total * one.workers / 3600:,.2f}"
        table.add_row(one.device, str(one.workers), duration(one.total), hours, memory, longest)
    console.print(table)
    console.print(
        "GPUs by their public figures (configs/cluster/devices.yaml), unmeasured"
        + ("" if made.probe is None else f"; this machine by a probe of {made.probe.rows:,} examples"), soft_wrap=True,
    )  # fmt: skip


def main(
    config: Annotated[str, typer.Argument(help="YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print what the job of CONFIG will take."""
    find_modules_here()
    with plain_errors():
        made = plan(load_config(config, overrides))
        if as_json:
            print(json.dumps(made.record()))
        else:
            show(made, Console())


if __name__ == "__main__":
    run_command(main)
