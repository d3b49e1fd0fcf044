"""What every command does before anything else. Scripts import it first, above what takes seconds to import."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import typer

INTERRUPTED = "interrupted: what was done is kept; run the same command again to resume"


def run_command(main: Callable[..., None]) -> None:
    """Run a function as a command line, its arguments and options from its signature; -h and --help explain them."""
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(main)
    app()


def find_modules_here() -> None:
    """Let modules in the current folder be found: a task of the user's own, named by dotted path.

    Python put the script's folder on its path, where `train` would mean launch/train.py; the current folder takes its
    place. Ray gives workers on this machine the current folder of their driver, and none of a script that is not here.
    """
    ours = Path(__file__).parent.resolve()
    sys.path[:] = [str(Path.cwd()), *(entry for entry in sys.path if not entry or Path(entry).resolve() != ours)]


def say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End on Ctrl-C with a message in the place of a traceback, also while a script still imports."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_interrupted
