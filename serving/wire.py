"""Answers, from a replica to the ingress on its own node through a Unix socket.

Ray makes an object of each part: with 32 streams that cost both sides together more than 1 ms of a core a token
(docs/results/serving.md). Here a part is one frame, what a replica says in one turn of its loop is written at once, and
what has come while the ingress was busy is read at once. Requests, their end and every failure stay with Ray Serve, so
a wire needs no heartbeat of its own: whoever waits at a box is told by `fail` what Serve says.

A frame is its length (4 bytes), the number of the box (8 bytes) and the part; an empty part is the end of the answer.
The folder of the socket is the user's own, and what comes through is bytes, of which nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import shutil
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

from contracts.waiting import answer
from models.engine_files import new_path

_FRAME = struct.Struct("!IQ")
_WAIT_S = 10.0
_GONE = "the ingress that asked is gone"
_AHEAD_BYTES = 1 << 20  # what may wait in a replica for an ingress that is busy


class WireLost(ConnectionError):
    """Nobody reads at the other end any more."""


@dataclass(frozen=True)
class ReplyTo:
    """Where parts of one answer are wanted: a box of an ingress, within reach of the processes of its node only."""

    node: str
    path: str
    box: int


class Box:
    """The parts of one answer that have come and were not taken. Without `reply_to` none comes by wire."""

    def __init__(self, reply_to: ReplyTo | None) -> None:
        self.reply_to = reply_to
        self.ended = False
        self._parts: list[bytes] = []
        self._error: BaseException | None = None
        self._came = asyncio.Event()

    async def take_first(self) -> bytes:
        """The oldest part alone; b"" at the end.

        Raises:
            BaseException: what `fail` was told, once everything from before is taken.
        """
        return await self._take(1)

    async def take(self) -> bytes:
        """All that has come since the last time, in order, and at least something; b"" at the end.

        Raises:
            BaseException: what `fail` was told, once everything from before is taken.
        """
        return await self._take(None)

    async def _take(self, most: int | None) -> bytes:
        await self._came.wait()
        if not self._parts:
            if self._error is not None:
                raise self._error
            return b""
        parts, self._parts = self._parts[:most], self._parts[most:] if most else []
        if not self._parts and not self.ended and self._error is None:
            self._came.clear()
        return b"".join(parts)

    def put(self, part: bytes) -> None:
        if part:
            self._parts.append(part)
        else:
            self.ended = True
        self._came.set()

    def fail(self, error: BaseException) -> None:
        """The answer will not go on. Nothing, where it has come to its end."""
        if not self.ended:
            self._error = error
            self._came.set()


class Inbox:
    """The end of an ingress: its boxes by number. On one event loop."""

    def __init__(self) -> None:
        self._boxes: dict[int, Box] = {}
        self._numbers = count()
        self._node = self._path = ""

    @asynccontextmanager
    async def opened(self, node: str) -> AsyncIterator[None]:
        """Replicas on `node`, Ray's id of this one, can connect meanwhile."""
        folder = new_path("wire")
        folder.mkdir(mode=0o700)
        connections: set[asyncio.BaseTransport] = set()
        try:
            path = str(folder / "in")
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(lambda: _Reader(self._boxes, connections), path)
            try:
                self._node, self._path = node, path
                yield
            finally:
                # Not `async with server`: from Python 3.12 on it waits until replicas hang up, and they never do.
                server.close()
                for connection in list(connections):
                    connection.close()
        finally:
            self._path = ""
            shutil.rmtree(folder, ignore_errors=True)

    def box(self) -> Box:
        """A new one, which nothing comes to by wire while no replica can connect."""
        if not self._path:
            return Box(None)
        reply_to = ReplyTo(self._node, self._path, next(self._numbers))
        box = self._boxes[reply_to.box] = Box(reply_to)
        return box

    def close(self, box: Box) -> None:
        """What still comes for it is dropped."""
        if box.reply_to is not None:
            self._boxes.pop(box.reply_to.box, None)


class _Reader(asyncio.Protocol):
    """One connection of a replica."""

    def __init__(self, boxes: dict[int, Box], connections: set[asyncio.BaseTransport]) -> None:
        self._boxes, self._connections = boxes, connections
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connections.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        data, start = self._rest + data, 0
        while len(data) - start >= _FRAME.size:
            length, number = _FRAME.unpack_from(data, start)
            end = start + _FRAME.size + length
            if end > len(data):
                break
            if number in self._boxes:
                self._boxes[number].put(data[start + _FRAME.size : end])
            start = end
        self._rest = data[start:]


class Wires:
    """The end of a replica on `node`: a connection to each ingress that has asked."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._wires: dict[str, _Wire] = {}
        self._connecting = asyncio.Lock()

    def reached(self, reply: ReplyTo | None) -> ReplyTo | None:
        """`reply`, where it is within reach."""
        return reply if reply is not None and reply.node == self._node else None

    async def deliver(self, parts: AsyncIterator[bytes], reply: ReplyTo) -> None:
        """Each of `parts` as soon as it is there, and the end.

        Raises:
            WireLost: the ingress is gone.
            NoAnswer: it does not let anybody connect, or has not read for `_WAIT_S` while much is waiting.
        """
        wire = await self._to(reply)
        async for part in parts:
            if part:
                await wire.write(reply.box, part)
        await wire.write(reply.box, b"")

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()

    async def _to(self, reply: ReplyTo) -> _Wire:
        async with self._connecting:
            self._wires = {path: each for path, each in self._wires.items() if not each.is_closing()}
            if reply.path not in self._wires:
                connect = asyncio.open_unix_connection(reply.path)
                try:
                    _, writer = await answer(connect, who="the ingress", asked="connect", deadline_s=_WAIT_S)
                except (ConnectionError, FileNotFoundError) as error:
                    raise WireLost(f"{_GONE}: {error.strerror}") from error
                self._wires[reply.path] = _Wire(writer)
            return self._wires[reply.path]


class _Wire:
    """A connection to one ingress. Parts of one turn of the loop, of however many answers, are one write: each write
    lets go of the interpreter's lock, for which every thread of the replica then competes."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._waiting: list[bytes] = []
        self._num_bytes = 0

    async def write(self, box: int, part: bytes) -> None:
        if self.is_closing():
            raise WireLost(_GONE)
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.append(_FRAME.pack(len(part), box) + part)
        self._num_bytes += len(part)
        if self._num_bytes + self._writer.transport.get_write_buffer_size() > _AHEAD_BYTES:
            self._send()
            try:
                await answer(self._writer.drain(), who="the ingress", asked="read answers", deadline_s=_WAIT_S)
            except ConnectionError as error:
                raise WireLost(_GONE) from error

    def is_closing(self) -> bool:
        return self._writer.is_closing()

    def close(self) -> None:
        self._send()
        self._writer.close()

    def _send(self) -> None:
        waiting, self._waiting, self._num_bytes = b"".join(self._waiting), [], 0
        if waiting and not self.is_closing():
            self._writer.write(waiting)
