"""Requests that are none: cut, slow, too large, or not HTTP. Each says what it did and what the server answered."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_WAIT_S = 30.0
CHAT: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}


@dataclass(frozen=True)
class Said:
    """What came back: the HTTP status (0: none, the connection was closed or nothing came) and the bytes after it."""

    status: int
    body: bytes = b""

    @property
    def retry_after(self) -> bool:
        return b"retry-after:" in self.body.lower()


class Wire:
    """Bytes to a server, and what it says."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._address = (parts.hostname, parts.port)

    def send(self, *pieces: bytes, pause_s: float = 0.0, listen: bool = True, after: bytes = b"") -> Said:
        """Pieces with pauses between them; without `listen` the connection is reset after the last.

        Where the answer contains `after`, the connection is reset as soon as it has come.
        """
        with socket.create_connection(self._address, timeout=_WAIT_S) as wire:
            try:
                for piece in pieces:
                    wire.sendall(piece)
                    time.sleep(pause_s)
                if not listen:
                    self._reset(wire)
                    return Said(0)
                return self._heard(wire, after)
            except OSError:  # a server may close while a client still writes
                return Said(0)

    def _heard(self, wire: socket.socket, after: bytes) -> Said:
        heard = b""
        expires = time.monotonic() + _WAIT_S
        while time.monotonic() < expires:
            wire.settimeout(max(0.01, expires - time.monotonic()))
            try:
                piece = wire.recv(65536)
            except TimeoutError:
                break
            except ConnectionResetError:
                piece = b""
            heard += piece
            if after and after in heard:
                self._reset(wire)
                break
            if not piece:
                break
        status = heard.split(b" ", 2)[1] if heard.startswith(b"HTTP/") else b"0"
        return Said(int(status), heard)

    @staticmethod
    def _reset(wire: socket.socket) -> None:
        """RST instead of FIN: what a client that dies leaves."""
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def request(body: bytes, *more: str, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    """A POST; `length` is what it declares, its own without."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    if length != -1:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, *more, "", ""]).encode("latin-1") + body


def cases() -> Iterator[tuple[str, Callable[[Wire], Said]]]:
    """By name, each to be sent over a connection of its own."""
    good = json.dumps(CHAT).encode()
    stream = json.dumps(CHAT | {"stream": True, "max_tokens": 64, "ignore_eos": True}).encode()
    chunked = request(b"", "Transfer-Encoding: chunked", length=-1)
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(good), good)

    yield "whole, in chunks", lambda wire: wire.send(chunked + whole)
    yield (
        "body cut in half, connection reset",
        lambda wire: wire.send(request(good[: len(good) // 2], length=len(good)), listen=False),
    )
    yield "body shorter than declared, connection closed", lambda wire: _half_closed(wire, request(good, length=4000))
    yield "body longer than declared", lambda wire: wire.send(request(good + b"garbage" * 50, length=len(good)))
    yield "a chunk cut in half", lambda wire: wire.send(chunked + whole[:30], listen=False)
    yield "a chunk whose length is no number", lambda wire: wire.send(chunked + b"zz\r\nhello\r\n0\r\n\r\n")
    yield "a chunk of negative length", lambda wire: wire.send(chunked + b"-5\r\nhello\r\n0\r\n\r\n")
    yield "two lengths", lambda wire: wire.send(request(good, "Content-Length: 5"))
    yield "length and chunks", lambda wire: wire.send(request(whole, "Transfer-Encoding: chunked"))
    yield "a length that is no number", lambda wire: wire.send(request(good, "Content-Length: ten", length=-1))
    yield "a negative length", lambda wire: wire.send(request(good, "Content-Length: -1", length=-1))
    yield "a huge length, nothing behind it", lambda wire: wire.send(request(b"", length=10**15))
    yield "a body over the limit", lambda wire: wire.send(request(b'{"a":"' + b"x" * (3 << 20) + b'"}'))
    yield (
        "a body over the limit, in chunks without an end",
        lambda wire: wire.send(chunked, *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 40),
    )
    yield "headers a byte at a time", lambda wire: wire.send(*(bytes([byte]) for byte in request(good)), pause_s=0.02)
    yield "half of the headers, then nothing", lambda wire: wire.send(request(good)[:40], pause_s=2.0, listen=False)
    yield (
        "a body a byte at a time",
        lambda wire: wire.send(request(b"", length=len(good)), *(bytes([byte]) for byte in good), pause_s=0.02),
    )
    yield "headers of 1 MiB", lambda wire: wire.send(request(good, "X-Large: " + "a" * (1 << 20)))
    yield "10,000 headers", lambda wire: wire.send(request(good, *(f"X-{n}: a" for n in range(10_000))))
    yield "a key of 100,000 characters", lambda wire: wire.send(request(good, "Authorization: Bearer " + "a" * 100_000))
    yield "a key of bytes that are no ASCII", lambda wire: wire.send(request(good, "Authorization: Bearer \xe9\xff"))
    yield "a path of 100,000 characters", lambda wire: wire.send(request(good, path="/v1/" + "a" * 100_000))
    yield "a path with broken percent signs", lambda wire: wire.send(request(good, path="/v1/models/%zz%ff%00"))
    yield "a path that climbs", lambda wire: wire.send(request(good, path="/../../../etc/passwd"))
    yield "invalid UTF-8", lambda wire: wire.send(request(b'{"model":"policy","messages":"\xff\xfe\x80"}'))
    yield "invalid UTF-8 in a prompt", lambda wire: wire.send(request(good.replace(b"Hello", b"He\xc3\x28llo")))
    yield "half of a surrogate pair", lambda wire: wire.send(request(good.replace(b"Hello", b"\\ud800")))
    yield "half of a surrogate pair, streamed", lambda wire: wire.send(request(stream.replace(b"Hello", b"\\udfff")))
    yield "a zero byte in a prompt", lambda wire: wire.send(request(good.replace(b"Hello", b"a\\u0000b")))
    yield "JSON 100,000 deep", lambda wire: wire.send(request(b"[" * 100_000 + b"]" * 100_000))
    yield "objects 100,000 deep", lambda wire: wire.send(request(b'{"a":' * 100_000 + b"1" + b"}" * 100_000))
    yield (
        "metadata 5,000 deep",
        lambda wire: wire.send(request(good[:-1] + b',"metadata":' + b"[" * 5000 + b"]" * 5000 + b"}")),
    )
    yield "a number of 100,000 digits", lambda wire: wire.send(request(good.replace(b"8}", b"9" * 100_000 + b"}")))
    yield "numbers that are none", lambda wire: wire.send(request(good[:-1] + b',"temperature":NaN,"top_p":Infinity}'))
    yield "a field twice", lambda wire: wire.send(request(good[:-1] + b',"max_tokens":4}'))
    yield "no JSON at all", lambda wire: wire.send(request(b"model=policy&messages=hello"))
    yield "an empty body", lambda wire: wire.send(request(b""))
    yield "another content type", lambda wire: wire.send(request(good, "Content-Type: application/xml"))
    yield "gzip that is none", lambda wire: wire.send(request(good, "Content-Encoding: gzip"))
    yield (
        "an upgrade to a websocket",
        lambda wire: wire.send(
            b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        ),
    )
    yield "HTTP/0.9", lambda wire: wire.send(b"GET /\r\n\r\n")
    yield "HTTP/2's first bytes", lambda wire: wire.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04")
    yield "TLS", lambda wire: wire.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(512))
    yield "random bytes", lambda wire: wire.send(bytes(range(256)) * 40)
    yield "a stream left at its first token", lambda wire: wire.send(request(stream), after=b"data: {")
    yield "a stream left before its first token", lambda wire: wire.send(request(stream), listen=False)
    yield (
        "a whole answer left before it came",
        lambda wire: wire.send(
            request(stream.replace(b'"stream": true', b'"stream": false')), pause_s=0.1, listen=False
        ),
    )
    yield (
        "two requests on one connection, the second broken",
        lambda wire: wire.send(
            request(good).replace(b"Connection: close", b"Connection: keep-alive") + b"GARBAGE\r\n\r\n"
        ),
    )
    for path, surrogate in _SURROGATES.items():
        yield f"JSON 100,000 deep to {path}", _post(b"[" * 100_000 + b"]" * 100_000, path)
        yield f"half of a surrogate pair to {path}", _post(surrogate, path)


def _post(body: bytes, path: str) -> Callable[[Wire], Said]:
    return lambda wire: wire.send(request(body, path=path))


_SURROGATES = {
    "/v1/feedback": b'{"id":"\\ud800","kind":"thumbs","value":"up","idempotency_key":"\\udc00"}',
    "/v1/score": b'{"prompt":"\\ud800","response":"\\udfff"}',
    "/v1/versions/pin": b'{"version":"\\ud800"}',
    "/v1/versions/rollback": b'{"version":99999999999999999999999999}',
    "/v1/completions": b'{"model":"policy","prompt":["\\ud800"],"max_tokens":4}',
}


def _half_closed(wire: Wire, sent: bytes) -> Said:
    """The client has no more to say, and listens."""
    with socket.create_connection(wire._address, timeout=_WAIT_S) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return wire._heard(connection, b"")
