"""Who may come in: keys, scopes, the size of bodies and the rate of requests, before a route sees anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts.clock import now
from contracts.waiting import NoAnswer, answer
from serving.keys import LOCAL, Key, Keys, is_local
from serving.limits import Admission, Rates
from serving.meters import Meters
from serving.protocol import ApiError, overloaded

_BODY_S = 30.0

# What a route asks for: a scope, or "" for any key at all. What is not here is open: the pages and /health.
_NEEDS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "chat",
    "/v1/score": "score",
    "/v1/feedback": "feedback",
    "/v1/versions/pin": "admin",
    "/v1/versions/rollback": "admin",
    "/metrics": "",
}


class Door:
    """ASGI middleware. The caller's key is `scope["key"]` behind it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        requests: Rates,
        admission: Admission,
        max_body_bytes: int,
        meters: Meters,
    ) -> None:
        self._app, self._keys, self._requests, self._meters = app, keys, requests, meters
        self._admission = admission
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        answered = False

        async def count(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                self._meters.answered(_path(scope), message["status"])
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            scope["key"] = self._let_in(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await JSONResponse({"error": error.error}, error.status, error.headers)(scope, receive, count)
            return
        caller = _Caller(body, receive)
        route = asyncio.current_task()
        watching = asyncio.create_task(caller.cancel_when_gone(route, lambda: answered))
        try:
            await self._app(scope, caller.message, count)
        except asyncio.CancelledError:
            if not caller.cancelled or route is None or route.uncancel():
                raise
        finally:
            watching.cancel()

    def _let_in(self, scope: Scope) -> Key:
        path, headers = _path(scope), Headers(scope=scope)
        needs = _NEEDS.get(path, "" if path.startswith("/v1/") else None)
        if needs is None:
            return LOCAL
        key = self._caller(scope, headers)
        if needs and needs not in key.scopes:
            raise ApiError(403, f"the key {key.name!r} may not {needs}: use one with that scope", code="missing_scope")
        if scope["method"] == "POST":
            wait_s = self._requests.take(key.name, 1, now_s=now())
            if wait_s:
                raise ApiError(
                    429,
                    f"too many requests with this key: ask again in {wait_s:.1f} s",
                    code="rate_limit_exceeded",
                    retry_after_s=wait_s,
                )
            if needs == "chat" and self._admission.full:
                raise overloaded(self._admission.waiting)  # reading its body would be most of the work of refusing it
        return key

    def _caller(self, scope: Scope, headers: Headers) -> Key:
        if not self._keys:
            if is_local((scope.get("client") or (None,))[0], headers):
                return LOCAL
            raise ApiError(
                401,
                "there are no API keys, so only callers on this machine are answered: make one with `headrace key`",
                code="no_keys",
            )
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise ApiError(401, "no API key: send it as `Authorization: Bearer KEY`", code="missing_api_key")
        key = self._keys.find(secret.strip())
        if key is None:
            raise ApiError(401, "this API key is not known here: check it, or ask for another", code="invalid_api_key")
        return key

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of it: it has a limit, and a route that reads it later needs no watch over its size."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared[:20]) > self._max_body_bytes:
            raise self._too_large()
        body, expires = bytearray(), now() + _BODY_S
        while True:
            left_s = max(0.0, expires - now())
            try:
                message = await answer(receive(), who="the caller", asked="send its body", deadline_s=left_s)
            except NoAnswer:
                late = f"the body was not complete after {_BODY_S:g} s: send it faster, or less of it"
                raise ApiError(408, late, code="body_too_late") from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the connection was closed before the body was complete")
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        message = f"the body has more than {self._max_body_bytes} bytes: send a shorter prompt"
        return ApiError(413, message, code="body_too_large")


def _path(scope: Scope) -> str:
    """Without the prefix of the application (Ray Serve's `route_prefix`)."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


class _Caller:
    """Who asked: gives a route the body in one piece, and ends the route when it hangs up, which frees its place."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._receive = receive
        self._gone = asyncio.Event()
        self.cancelled = False

    async def message(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def cancel_when_gone(self, route: asyncio.Task[Any] | None, answered: Callable[[], bool]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if route is not None and not answered():  # a server says it after the end of an answer too
            self.cancelled = True
            route.cancel()
