"""Score a training corpus for a set of queries: the main job.

    python launch/score.py CONFIG [section.key=value …]
    ray job submit --working-dir . -- python launch/score.py CONFIG …

Run it again after any interruption: what is done is kept, and the result is the same.
"""

from launch.command import find_modules_here, run_command  # isort: split

import sys
from typing import Annotated

import typer

from launch.config import load_config
from launch.describe import describe_config
from launch.job import score
from launch.messages import plain_errors
from storage.index import ScoreIndex
from storage.locations import Location


def main(
    config: Annotated[str | None, typer.Argument(help="YAML file")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Score the corpus of CONFIG and write the index."""
    find_modules_here()
    with plain_errors():
        if config is None:
            raise ValueError("CONFIG is missing: name a YAML file. `--help` prints every section and field.")
        settings = load_config(config, overrides)
        label = score(settings)
        print(f"scores {label} are in {settings.run.uri}")
        print(f"ask: {query_command(settings.run.uri, label)}")


def query_command(run: str, label: str) -> str:
    """Return the command that asks these scores about the first query."""
    several = len(ScoreIndex.labels(Location.parse(run))) > 1
    return f"python launch/query.py {run} --query 0" + (f" --scores {label}" if several else "")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        print(describe_config())
    else:
        run_command(main)
