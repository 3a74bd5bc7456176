"""Serve replicas that die: their requests are sent again, and the run is told who died and who came instead.

Serve itself starts another replica for one that died, or that left three health checks in a row unanswered.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.schema import DeploymentStatus, DeploymentStatusTrigger, ReplicaState

from contracts.clock import now
from contracts.events import Event
from contracts.waiting import NoAnswer, answer

_CHECK_PERIOD_S = 2.0
_LOOK_AGAIN_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_LOST = (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError)

T = TypeVar("T")


def health_checks(health_s: float) -> dict[str, Any]:
    """Options of a deployment whose replicas are replaced when they leave three checks of `health_s` unanswered."""
    return {"health_check_period_s": _CHECK_PERIOD_S, "health_check_timeout_s": health_s}


async def ask(send: Callable[[], Awaitable[T]], *, who: str, asked: str, deadline_s: float) -> T:
    """The answer of a replica. Where it dies, the request is sent again, with growing pauses: it holds no state.

    Raises:
        NoAnswer: none answered within the deadline; says what became of the last one that was lost, and where.
    """
    lost: list[Exception] = []

    async def until_answered() -> T:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await send()
            except _LOST as error:
                lost.append(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    try:
        return await answer(until_answered(), who=who, asked=asked, deadline_s=deadline_s)
    except NoAnswer as error:
        if not lost:
            raise
        node = re.search(r"\bip: (\S+)", str(lost[-1]))
        where = f" on node {node.group(1)}" if node else ""
        said = " ".join(str(lost[-1]).split())
        raise NoAnswer(f"{error}; {len(lost)} times the replica{where} was lost, the last time: {said}") from error


@dataclass(frozen=True)
class _Replica:
    replica_id: str
    pid: int | None
    node: str


async def watch(applications: Mapping[str, str], *, on_event: Callable[[Event], None], deadline_s: float) -> None:
    """Tell of each replica that dies and of each that takes its place, not of those that Serve adds or takes away as
    the load changes. Ends only by raising.

    Args:
        applications: Serve applications and how they are called in events.

    Raises:
        RuntimeError: replicas of an application failed to start too often in a row (three times for each that it
            should have); carries the last one's traceback.
        NoAnswer: Ray Serve has not said how its applications are for `deadline_s`.
    """
    running: dict[tuple[str, str], dict[str, _Replica]] = {}
    gone: defaultdict[tuple[str, str], list[tuple[_Replica, float]]] = defaultdict(list)
    answered = now()
    while True:
        try:
            details = await _details(deadline_s)
            answered = now()
        except (RayActorError, RayServeException) as error:  # its controller is being restarted
            if now() - answered > deadline_s:
                raise NoAnswer(f"Ray Serve has not said for {deadline_s:g} s how its replicas are: {error}") from error
            details = {}
        for name in applications.keys() & details.keys():
            who = applications[name]
            for deployment in details[name]["deployments"].values():
                where = name, deployment["name"]
                found = {each.replica_id: each for each in _running(deployment)}
                before = running.get(where, found)
                left = sorted(before.keys() - found.keys())
                for replica_id in left[num_surplus(len(before), deployment["target_num_replicas"]) :]:
                    lost = before[replica_id]
                    cause = f"replica {replica_id}, process {lost.pid}, died or left its health checks unanswered"
                    on_event(Event("death", who, cause, "its requests are sent again, Serve starts another", lost.node))
                    gone[where].append((lost, now()))
                for replica_id in sorted(found.keys() - before.keys()):
                    if gone[where]:
                        lost, since = gone[where].pop(0)
                        consequence = f"replica {replica_id} took over after {now() - since:.1f} s"
                        cause = f"replica {lost.replica_id} was lost"
                        on_event(Event("restart", who, cause, consequence, found[replica_id].node))
                running[where] = found
                _raise_for_crash_loop(who, deployment)
        await asyncio.sleep(_LOOK_AGAIN_S)


def num_surplus(num_running: int, num_wanted: int) -> int:
    """How many of those that ran may be gone because Serve scaled down, or the application is being removed.

    >>> num_surplus(2, 2), num_surplus(2, 1), num_surplus(1, 2)
    (0, 1, 0)
    """
    return max(0, num_running - num_wanted)


def _running(deployment: Mapping[str, Any]) -> list[_Replica]:
    return [
        _Replica(each["replica_id"], each["pid"], each["node_ip"] or "")
        for each in deployment["replicas"]
        if each["state"] == ReplicaState.RUNNING
    ]


def _raise_for_crash_loop(who: str, deployment: Mapping[str, Any]) -> None:
    failed = deployment["status_trigger"] == DeploymentStatusTrigger.REPLICA_STARTUP_FAILED
    if failed and deployment["status"] in (DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED):
        raise RuntimeError(f"{who}: its replicas keep failing to start: {deployment['message']}")


async def _details(deadline_s: float) -> dict[str, Any]:
    """Serve's applications by name, as in its REST API (`ServeInstanceDetails`)."""
    client = _get_global_client()
    if client is None:
        return {}
    details = asyncio.to_thread(client.get_serve_details)
    found: dict[str, Any] = (
        await answer(details, who="Ray Serve", asked="say how its replicas are", deadline_s=deadline_s)
    )["applications"]
    return found
