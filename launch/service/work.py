"""What the routes share: the catalog, the threads in which answers are made, the jobs."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio
import anyio.to_thread
from starlette.exceptions import HTTPException

from launch.service.catalog import Catalog
from launch.service.guard import Limits
from launch.service.jobs import JobBoard
from launch.service.metrics import Metrics

Found = TypeVar("Found")
READERS = 8  # answers read at once; more threads cost memory, and on few cores time


class Service:
    """New questions have one thread of their own; how many wait for it is limited and counted."""

    def __init__(self, catalog: Catalog, limits: Limits, metrics: Metrics) -> None:
        self.catalog, self.limits, self.metrics = catalog, limits, metrics
        self.board = JobBoard()
        self._readers = anyio.CapacityLimiter(READERS)
        self._thread = ThreadPoolExecutor(1, "attribute")
        self._waiting = 0

    async def ask(self, call: Callable[[], Found]) -> Found:
        """Return what a call finds, made in a thread; TimeoutError after the limit."""
        with anyio.fail_after(self.limits.seconds):
            return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._readers)

    async def compute(self, call: Callable[[], Found]) -> Found:
        """Return what a call of the one computing thread finds. 429 if too many wait for it."""
        if self._waiting >= self.limits.waiting:
            raise HTTPException(429, f"{self._waiting} questions are being computed: try later", {"Retry-After": "2"})
        self._count(1)
        future = asyncio.wrap_future(self._thread.submit(call))
        future.add_done_callback(self._done)  # a question given up still computes
        return await asyncio.wait_for(asyncio.shield(future), self.limits.seconds)

    def close(self) -> None:
        """Let what computes end, and nothing begin."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: asyncio.Future[Found]) -> None:
        self._count(-1)
        if not future.cancelled():
            future.exception()  # one given up has nobody else to look at its error

    def _count(self, step: int) -> None:
        self._waiting += step
        self.metrics.attributing.inc(step)
