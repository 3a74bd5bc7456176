"""Replicas that Ray Serve has told to finish what they write and end, because fewer are needed or one is unwell.

They are not told of it themselves before their last answer has ended, and nobody is sent to them any more.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.context import _get_global_client
from ray.serve.schema import ReplicaState

from contracts.waiting import answer

_SERVE_S = 10.0


async def ending(application: str, deployment: str) -> list[str]:
    """Their names (`ReplicaID.unique_id`).

    Raises:
        NoAnswer: Ray Serve did not say.
        RayError, RayServeException: its controller is not there.
    """
    asked = f"say which replicas of {deployment} are ending"
    details = await answer(asyncio.to_thread(_details), who="Ray Serve", asked=asked, deadline_s=_SERVE_S)
    found: dict[str, Any] = details["applications"].get(application, {"deployments": {}})["deployments"]
    replicas = found[deployment]["replicas"] if deployment in found else []
    return [each["replica_id"] for each in replicas if each["state"] == ReplicaState.STOPPING]


def _details() -> dict[str, Any]:
    """All applications, as in Serve's REST API (`ServeInstanceDetails`)."""
    client = _get_global_client()
    return {"applications": {}} if client is None else client.get_serve_details()
