"""`headrace serve --stop NAME`: a served policy is taken off a cluster, when its answers have ended."""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass

from actors.applications import application_names, applications_with, delete_application, finishing_s
from cluster import launch
from cluster.application import STOP_MARGIN_S
from cluster.progress import Progress
from contracts.config import ConfigError, DeadlinesConfig, LoggingConfig, RayConfig
from contracts.serving import ServingConfig
from contracts.waiting import NoAnswer
from serving.records import VERSIONS

_CONNECT_S = 60.0
_NO_RAY = (ConnectionError, RuntimeError, ValueError, NoAnswer)


@dataclass(frozen=True)
class _There:
    """What connecting takes of a configuration."""

    ray: RayConfig
    deadlines: DeadlinesConfig
    logging: LoggingConfig


async def stop_serving(name: str, address: str, progress: Progress) -> str:
    """Take the policy `name` (`serving.name`) off the cluster at `address`; what was removed, in one line.

    Raises:
        ConfigError: no cluster answers there, or it serves no such policy.
        NoAnswer: the answers that were being written took longer than they may.
    """
    if "://" in address and not address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: the address of a Ray cluster is expected, as in ray.address: auto on one of its "
            "machines; from elsewhere: ray job submit --address URL -- headrace serve --stop NAME"
        )
    _check_reachable(address)
    there = _There(RayConfig(address=address), DeadlinesConfig(start_s=_CONNECT_S), LoggingConfig())
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(launch.cluster(there, name, progress, learner_only=True))
        except _NO_RAY as error:
            raise ConfigError(f"--address {address}: no Ray cluster answers there: {_line(error)}") from error
        progress.phase("Finishing the answers that are being written")
        removed = await take_off(name, address, there.deadlines)
    return f"removed {', '.join(removed)}"


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes to reach an address at which nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
                pass
        except OSError as error:
            raise ConfigError(f"--address {address}: no Ray cluster answers there: {_line(error)}") from error


async def take_off(name: str, where: str, deadlines: DeadlinesConfig) -> list[str]:
    """The applications that were removed: the policy's, then those that scored for it.

    Raises:
        ConfigError: there is no such policy; names those that there are.
        NoAnswer: the answers that were being written took longer than they may.
    """
    application = ServingConfig(name=name).application
    served = await applications_with(VERSIONS, deadlines.stop_s)
    if application not in served:
        prefix = ServingConfig(name="-").application.removesuffix("-")
        names = ", ".join(each.removeprefix(prefix) for each in served) or "none"
        raise ConfigError(f"the cluster at {where} serves no policy of the name {name}; it serves {names}")
    beside = f"{application}-score-"
    scorers = [each for each in await application_names(deadlines.stop_s) if each.startswith(beside)]
    finish_s = await finishing_s(application, deadline_s=deadlines.stop_s)
    await delete_application(application, deadline_s=finish_s + STOP_MARGIN_S)
    mine = [each for each in scorers if each not in served]  # a policy may be called NAME-score-...
    for each in mine:
        await delete_application(each, deadline_s=deadlines.stop_s)
    return [application, *mine]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
