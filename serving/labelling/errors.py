"""Refusals as JSON: a status for programs, and a line that says what to change."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts.disk import DiskFull
from contracts.waiting import NoAnswer
from feedback.store import Refused

log = logging.getLogger("headrace.labelling")

# Of the store's refusals: the status, and what to do. Any other code is a request that cannot be: 422.
ADVICE: dict[str, tuple[int, str]] = {
    "unknown_annotator": (401, "send the token of somebody who is active here"),
    "unknown_task": (404, "ask for a task with POST api/next"),
    "unknown_judgment": (404, "undo takes the judgment_id of a vote of your own"),
    "no_lease": (409, "ask for a task with POST api/next and answer that one"),
    "lease_expired": (410, "POST api/next may bring the same one"),
    "lease_ended": (409, "ask for a task with POST api/next"),
    "already_voted": (409, "take the earlier vote back first, with POST api/judgments/{judgment_id}/undo"),
    "already_undone": (409, "ask for a task with POST api/next"),
    "key_reused": (409, "use a new idempotency_key for each vote, and the same one only to send that vote again"),
    "busy": (503, "send it again with the same idempotency_key"),
}
CHANGE_THE_REQUEST = (422, "correct the request and send it again")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    b"content-security-policy": PAGE_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


def error(status: int, code: str, message: str, *, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"status": status, "code": code, "message": message, "type": kind, "param": param}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
    return JSONResponse({"error": body}, status, headers=headers)


def answer_errors(app: FastAPI) -> None:
    """Every failure of `app` is answered in one shape."""

    @app.exception_handler(Refused)
    async def refused(_: Request, exc: Refused) -> JSONResponse:
        status, advice = ADVICE.get(exc.code, CHANGE_THE_REQUEST)
        return error(status, exc.code, f"{exc}: {advice}")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, exc: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = dict(exc.errors()[0])
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        return error(422, "bad_request", f"{where}: {first['msg']}: {CHANGE_THE_REQUEST[1]}", param=where)

    @app.exception_handler(HTTPException)
    async def http(_: Request, exc: HTTPException) -> JSONResponse:
        advice = {404: "see api/openapi.json for what there is", 405: "see api/openapi.json for the method"}
        status = exc.status_code
        return error(status, f"http_{status}", f"{exc.detail}: {advice.get(status, CHANGE_THE_REQUEST[1])}")

    @app.exception_handler(NoAnswer)
    async def late(_: Request, exc: NoAnswer) -> JSONResponse:
        log.error("%s", exc)
        return error(503, "busy", f"{exc}: {ADVICE['busy'][1]}")

    @app.exception_handler(DiskFull)
    async def full(_: Request, exc: DiskFull) -> JSONResponse:
        log.error("%s", exc)
        return error(507, "disk_full", f"{exc}: tell whoever runs this, nothing was kept, and send it again later")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, exc: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=exc)
        return error(500, "internal", "something broke here: tell whoever runs this, and send it again later")


class Guard:
    """Adds the headers that keep the page closed, and refuses bodies over `max_body_bytes` before they are parsed."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS.items()]
            await send(message)

        body, more = bytearray(), True
        while more and len(body) <= self._max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self._max_body_bytes:
            refusal = error(
                413, "too_large", f"the body is larger than {self._max_body_bytes} bytes: send a shorter one"
            )
            await refusal(scope, receive, closed)
            return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def read_already() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, read_already, closed)
