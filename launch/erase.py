"""Leave training examples out of every answer, at once; with --compact also out of the bytes.

python launch/erase.py RUN --ids FILE                ids of the run, one a line
python launch/erase.py RUN --source-ids FILE         the corpus's own ids, one a line: all chunks of these records
python launch/erase.py RUN --compact                 what was erased so far leaves rows, gradients, scores and tables

Ids of other examples stay as they are. The training of a model is not undone: what it learned from them stays in it.
"""

from launch.command import run_command  # isort: split

from pathlib import Path
from typing import Annotated

import typer

from actors.compaction import compact
from launch.messages import plain_errors
from launch.sources import TRAIN
from storage.corpus import Corpus, erased_ids
from storage.leases import RunLease
from storage.locations import Location
from storage.run_format import check_format


def read_lines(file: str) -> list[str]:
    """Return a file's lines that are not blank. ValueError if there is none."""
    lines = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} names no example: one id a line")
    return lines


def erase(run: Location, ids: str | None, source_ids: str | None) -> int:
    """Erase the examples that a file names and return how many are new. ValueError for an id that is not there."""
    corpus = Corpus.open(run, TRAIN)
    if source_ids is not None:
        found = corpus.ids_of(read_lines(source_ids))
    else:
        lines = read_lines(str(ids))
        wrong = [line for line in lines if not line.isdecimal()]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} in {ids} is no id of the run: a whole number. --source-ids takes your own ids"
            )
        found = [int(line) for line in lines]
    new = sorted(set(found) - corpus.erased())
    if new:
        corpus.erase(new)
    return len(new)


def main(
    run: Annotated[str, typer.Argument(help="folder or s3:// prefix of a run")],
    ids: Annotated[str | None, typer.Option(help="file of ids of the run, one a line")] = None,
    source_ids: Annotated[str | None, typer.Option(help="file of the corpus's own ids, one a line")] = None,
    compacted: Annotated[bool, typer.Option("--compact", help="remove the bytes of all that is erased")] = False,
) -> None:
    """Erase training examples."""
    with plain_errors():
        if (ids is not None and source_ids is not None) or not (ids or source_ids or compacted):
            raise ValueError("give either --ids FILE or --source-ids FILE, or --compact alone")
        place = Location.parse(run)
        check_format(place)
        if ids or source_ids:
            print(f"{erase(place, ids, source_ids):,} examples erased, {len(erased_ids(place, TRAIN)):,} in all")
        if compacted:
            with RunLease(place, "compaction", alone=True) as lease:
                compact(place, lease.check, print)


if __name__ == "__main__":
    run_command(main)
