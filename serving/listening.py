"""An HTTP server in the ingress's own process, for applications that Ray Serve's HTTP proxies are not in front of.

The proxy is one more process on the way of every part of an answer: it costs a request 8 ms, and a token of 32 streams
0.8 ms of a core (docs/results/serving.md). One ingress bounds the queue of the whole application, so that nothing is
there for several proxies to spread.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from contracts.waiting import NoAnswer, answer

ON_THE_HEAD = {"node:__internal_head__": 0.001}  # of an actor's resources: Ray gives its head node one of them

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # clients keep a connection for the next request; one that closes first would fail that
_CLOSING_S = 5.0


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals of this process are Ray's."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        RuntimeError: it cannot be had; says which and why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)  # what Python says names the address again
        raise RuntimeError(f"cannot listen on {host}:{port}: {reason}") from None


@asynccontextmanager
async def serving_http(app: ASGIApp, listening: socket.socket, *, finish_s: float) -> AsyncIterator[asyncio.Task[None]]:
    """Answer what connects there, on this event loop; afterwards what runs is finished, in at most `finish_s`.

    The task ends before that only where the server has broken.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # they would let a caller say who it is
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(finish_s),
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield running
    finally:
        server.should_exit = True
        with suppress(NoAnswer):
            await answer(running, who="the HTTP server", asked="finish", deadline_s=finish_s + _CLOSING_S)
