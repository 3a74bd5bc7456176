"""GET /health, /metrics, /v1/versions; POST /v1/versions/pin and /rollback."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.desk import Desk
from serving.protocol import ApiError, PinRequest, RollbackRequest

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """200 where the policy is served: this process and the keeper answer, and a replica has a version."""
    status = await request.app.state.desk.ask_keeper("status")
    return {"status": "ok", "weights_version": status["current"]}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(request.app.state.desk.meters.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/versions")
async def versions(request: Request) -> dict[str, Any]:
    """What is served by whom, and what became of each version, oldest first."""
    desk: Desk = request.app.state.desk
    status = await desk.ask_keeper("status")
    history = await desk.ask_keeper("history")
    return {"object": "versions", "status": status, "history": [asdict(row) for row in history]}


@router.post("/v1/versions/pin")
async def pin(body: PinRequest, request: Request) -> dict[str, Any]:
    """Serve one version until further notice, or follow training again with "latest"."""
    target = str(body.version)
    if target != "latest" and not (target.isascii() and target.isdigit() and len(target) <= 15):
        raise ApiError(
            400, f'version is {target!r:.40}, allowed is a version such as "12", or "latest"', param="version"
        )
    return {"object": "versions", "status": await request.app.state.desk.ask_keeper("pin", target)}


@router.post("/v1/versions/rollback")
async def rollback(body: RollbackRequest, request: Request) -> dict[str, Any]:
    """Go back to an older version and stay there."""
    return {"object": "versions", "status": await request.app.state.desk.ask_keeper("rollback", body.version)}
