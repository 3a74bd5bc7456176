"""Starting a Ray Serve application with a deadline, and removing it.

Serve is one per cluster and outlives jobs: names carry the run's id, a run deletes its own applications and never
shuts Serve down.
"""

from __future__ import annotations

import asyncio
import time

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from contracts.waiting import NoAnswer, answer

_POLL_S = 0.2
_STATUS_S = 5.0  # after the deadline: for what Serve was doing meanwhile, which the error says


async def run_application(app: serve.Application, name: str, *, start_s: float) -> DeploymentHandle:
    """Deploy, without a route through Serve's HTTP proxies, and wait until every replica is healthy.

    Raises:
        RuntimeError: a replica failed to start; carries Serve's message, the replica's own error in it.
        NoAnswer: it was not running after `start_s` seconds; the message says what Serve was doing.
    """
    target = serve.RunTarget(target=app, name=name, route_prefix=None)
    expires = time.monotonic() + start_s
    deploy = asyncio.to_thread(serve.run_many, [target], wait_for_applications_running=False)
    await answer(deploy, who="Ray Serve", asked=f"deploy {name}", deadline_s=start_s)
    while True:
        status = (await _applications(expires - time.monotonic() + _STATUS_S))[name]
        if status.status == ApplicationStatus.RUNNING:
            handle = asyncio.to_thread(serve.get_app_handle, name)
            return await answer(handle, who="Ray Serve", asked=f"give a handle of {name}", deadline_s=start_s)
        details = "; ".join(f"{key}: {value.message}" for key, value in status.deployments.items() if value.message)
        if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise RuntimeError(f"Serve application {name} failed to start: {details or status.message}")
        if time.monotonic() > expires:
            raise NoAnswer(f"Serve application {name} was not running after {start_s:g} s: {details or status.status}")
        await asyncio.sleep(_POLL_S)


async def delete_applications(prefix: str, *, deadline_s: float) -> None:
    """Delete every application whose name begins with `prefix`."""
    names = [name for name in await _applications(deadline_s) if name.startswith(prefix)]
    for name in names:
        delete = asyncio.to_thread(serve.delete, name)
        await answer(delete, who="Ray Serve", asked=f"delete {name}", deadline_s=deadline_s)


async def delete_application(name: str, *, deadline_s: float) -> None:
    """Delete one, if it is there, and wait until its replicas have finished what they do.

    Raises:
        NoAnswer: they had not after `deadline_s`.
    """

    async def until_gone() -> None:
        await asyncio.to_thread(serve.delete, name, _blocking=False)
        while name in await _applications(deadline_s):  # noqa: ASYNC110 Serve is another process
            await asyncio.sleep(_POLL_S)

    await answer(until_gone(), who="Ray Serve", asked=f"delete {name}", deadline_s=deadline_s)


async def application_names(deadline_s: float) -> list[str]:
    """All that there are, of other runs too."""
    return sorted(await _applications(deadline_s))


async def applications_with(deployment: str, deadline_s: float) -> list[str]:
    """Those that have a deployment of this name."""
    return sorted(name for name, each in (await _applications(deadline_s)).items() if deployment in each.deployments)


async def finishing_s(name: str, *, deadline_s: float) -> float:
    """How long the replicas of an application may take to finish what they do, once it is deleted; 0 if it is gone."""
    client = _get_global_client()
    if client is None:
        return 0.0
    details = asyncio.to_thread(client.get_serve_details)
    found = (await answer(details, who="Ray Serve", asked=f"describe {name}", deadline_s=deadline_s))["applications"]
    deployments = found.get(name, {"deployments": {}})["deployments"].values()
    return max((each["deployment_config"]["graceful_shutdown_timeout_s"] for each in deployments), default=0.0)


async def _applications(deadline_s: float) -> dict[str, ApplicationStatusOverview]:
    status = asyncio.to_thread(serve.status)
    return (await answer(status, who="Ray Serve", asked="list its applications", deadline_s=deadline_s)).applications
