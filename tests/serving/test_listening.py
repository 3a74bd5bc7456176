"""The ingress's own HTTP server: what runs is finished, and callers that stall or leave hold nothing."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serving.door import Door
from serving.ingress import Ingress
from serving.keys import Keys
from serving.limits import Admission, Rates
from serving.listening import listen, serving_http
from serving.meters import Meters
from tests.head import free_ports


@asynccontextmanager
async def served(app: FastAPI, *, finish_s: float = 20.0) -> AsyncIterator[int]:
    (port,) = free_ports(1)
    async with serving_http(app, listen("127.0.0.1", port), finish_s=finish_s):
        yield port


def behind_a_door(app: FastAPI) -> FastAPI:
    admission = Admission(8)
    app.add_middleware(
        Door, keys=Keys([]), requests=Rates(None), admission=admission, max_body_bytes=1000, meters=Meters(admission)
    )
    return app


async def test_what_runs_is_finished_and_nothing_new_is_taken() -> None:
    app, begun = FastAPI(), asyncio.Event()

    @app.get("/slow")
    async def slow() -> str:
        begun.set()
        await asyncio.sleep(0.5)
        return "whole"

    async with httpx.AsyncClient(timeout=20) as client:
        async with served(app) as port:
            asked = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/slow"))
            await asyncio.wait_for(begun.wait(), 20)
        assert (await asked).json() == "whole"
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}/slow")


async def test_what_does_not_finish_in_time_is_ended() -> None:
    app, begun, ended = FastAPI(), asyncio.Event(), asyncio.Event()

    @app.get("/endless")
    async def endless() -> None:
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    async with httpx.AsyncClient(timeout=20) as client:
        async with served(app, finish_s=1.0) as port:
            asked = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/endless"))
            await asyncio.wait_for(begun.wait(), 20)
        assert ended.is_set()
        found: Any = await asyncio.gather(asked, return_exceptions=True)
        assert isinstance(found[0], httpx.TransportError) or found[0].status_code >= 500


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"^cannot listen on 127\.0\.0\.1:{port}: Address already in use$"):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


async def test_a_caller_who_leaves_ends_the_route() -> None:
    app, ended = behind_a_door(FastAPI()), asyncio.Event()

    @app.post("/v1/endless")
    async def endless() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    async with served(app) as port, httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"http://127.0.0.1:{port}/v1/endless", json={}, timeout=0.5)
        await asyncio.wait_for(ended.wait(), 20)


async def test_what_follows_an_answer_is_not_ended_with_it() -> None:
    """The server says that the caller is gone after each answer too."""
    app, done = behind_a_door(FastAPI()), asyncio.Event()

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        await asyncio.sleep(0.2)
        done.set()

    app.mount("/v1/plain", plain)
    async with served(app) as port, httpx.AsyncClient(timeout=20) as client:
        assert (await client.post(f"http://127.0.0.1:{port}/v1/plain/x", json={})).text == "ok"
        await asyncio.wait_for(done.wait(), 20)


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.door._BODY_S", 0.3)
    app = behind_a_door(FastAPI())

    @app.post("/v1/read")
    async def read() -> str:
        return "never"

    async with served(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        status = await asyncio.wait_for(reader.readline(), 20)
        assert b" 408 " in status
        writer.close()


async def test_an_ingress_whose_http_server_has_ended_is_unhealthy() -> None:
    async def broken() -> None:
        raise OSError("the loop lost the socket")

    desk: Any = SimpleNamespace(http=None)
    ingress: Any = SimpleNamespace(_desk=desk)
    await Ingress.check_health(ingress)
    desk.http = asyncio.create_task(broken())
    await Ingress.check_health(ingress)
    await asyncio.wait([desk.http])
    with pytest.raises(RuntimeError, match="the HTTP server has ended") as raised:
        await Ingress.check_health(ingress)
    assert "lost the socket" in str(raised.value.__cause__)
