"""What a person sees when a command fails: one clear message, and a traceback only for our own bugs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from actors.pool import PoolError
from actors.run_stage import StageStopped


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a mistake, a storage failure or a stop into its message on standard error and exit status 1 (130: Ctrl-C)."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError, PoolError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except StageStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        if error.detail:
            print(error.detail, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: what was done is kept; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
