"""A proxy before a server on this machine, which spoils a request when it is told to.

reset   the connection is reset before the request reaches the server
lost    the request reaches the server, its answer is lost: the connection is reset instead
cut     the connection is reset after some bytes of the answer
busy    the request is answered 503 and never reaches the server
"""

import asyncio
import random
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

Fault = Literal["reset", "lost", "cut", "busy"]
METHODS = (b"GET ", b"PUT ", b"HEAD ", b"POST ", b"DELETE ")
BUSY = b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
CHUNK = 1 << 16
LINGER = 2.0  # seconds that the rest of a refused request is read for


@dataclass
class _Connection:
    """Both directions of one connection, and what is to become of the next answer."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    fault: Fault | None = None

    def reset(self) -> None:
        for writer in (one for one in (self.client, self.server) if not one.transport.is_closing()):
            end = writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            writer.transport.abort()


class TcpProxy:
    """A proxy on a port of its own, in a thread of its own, while in its `with` block."""

    def __init__(self, target: int, seed: int = 0) -> None:
        self.target = target
        self.port = 0
        self.spoiled = 0  # requests so far
        self.refused = 0  # connections that the server did not take
        self._due: deque[Fault] = deque()
        self._open: list[_Connection] = []
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "TcpProxy":
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.port = server.result().sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def spoil(self, fault: Fault) -> None:
        """Spoil the next request that comes in like this."""
        self._due.append(fault)

    async def _end(self) -> None:
        for connection in self._open:
            connection.reset()
        if ending := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            await asyncio.wait(ending, timeout=LINGER)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            self.refused += 1
            writer.transport.abort()
            return
        connection = _Connection(writer, server)
        self._open.append(connection)
        ways = [asyncio.create_task(self._up(reader, connection)), asyncio.create_task(self._down(answers, connection))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._open.remove(connection)
            for end in (writer, server):
                end.close()

    async def _up(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await reader.read(CHUNK):
            fault = self._due.popleft() if self._due and data.startswith(METHODS) else None
            if fault == "reset":
                self.spoiled += 1
                connection.reset()
                return
            if fault == "busy":
                self.spoiled += 1
                await self._refuse(reader, connection)
                return
            connection.fault = fault or connection.fault
            connection.server.write(data)
            await connection.server.drain()

    async def _refuse(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        connection.client.write(BUSY)
        await connection.client.drain()
        try:
            async with asyncio.timeout(LINGER):
                while await reader.read(CHUNK):
                    pass
        except TimeoutError:
            return

    async def _down(self, answers: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await answers.read(CHUNK):
            if connection.fault is not None:
                passed = 0 if connection.fault == "lost" else self._random.randrange(1, len(data))
                connection.client.write(data[:passed])
                await connection.client.drain()
                self.spoiled += 1
                connection.reset()
                return
            connection.client.write(data)
            await connection.client.drain()
