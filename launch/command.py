"""What a command does before anything else."""

import sys
from pathlib import Path


def find_modules_here() -> None:
    """Let modules in the current folder be found: a task of the user's own, named by dotted path.

    Python put the script's folder on its path, where `train` would mean launch/train.py; the current folder takes its
    place. Ray gives workers on this machine the current folder of their driver, and none of a script that is not here.
    """
    ours = Path(__file__).parent.resolve()
    sys.path[:] = [str(Path.cwd()), *(entry for entry in sys.path if not entry or Path(entry).resolve() != ours)]
