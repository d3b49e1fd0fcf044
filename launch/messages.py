"""What a person sees when a command fails: one clear message, and a traceback only for our own bugs."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from actors.pool import PoolError
from actors.run_stage import StageStopped
from launch.command import INTERRUPTED


def tell(text: str) -> None:
    """Say how a job goes: on standard error, where its progress stands too, so that the lines keep their order."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a mistake, a storage failure or a stop into its message on standard error and an exit status.

    1; 130 for Ctrl-C; 143 for SIGTERM, which ends a command as Ctrl-C does.
    """
    with terminated_as_interrupted() as terminated:
        try:
            yield
        except (ValueError, FloatingPointError, OSError, PoolError) as error:
            _end(f"error: {error}", 1)
        except StageStopped as error:
            _end(f"stopped: {error}" + (f"\n{error.detail}" if error.detail else ""), 1)
        except KeyboardInterrupt:
            _end(INTERRUPTED, 143 if terminated else 130)


@contextmanager
def terminated_as_interrupted() -> Iterator[list[int]]:
    """Let SIGTERM raise KeyboardInterrupt, which Ray's waits let through; the list then holds the signal."""
    received: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
