"""Nodes that leave the cluster: with notice, what runs there moves before they go; without, they are named.

Ray tells who died, actor by actor, to whoever asks it something. What runs on a node and is asked nothing at the moment
would be missed only later: so the nodes themselves are watched.

Serve moves its replicas off a draining node by itself, and replaces those that a lost node took along.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as cluster_state

from cluster import recover
from cluster.job import Job
from contracts.clock import now
from contracts.events import Event
from contracts.waiting import answer

_LOOK_AGAIN_S = 1.0
_UNKNOWN_DEADLINE_S = 60.0  # of a node that leaves without saying when


@dataclass(frozen=True)
class Nodes:
    """The cluster at one moment, by node id: addresses of those that live, seconds that draining ones have left
    (infinite where they do not say), and why dead ones died.
    """

    alive: Mapping[str, str]
    draining: Mapping[str, float]
    dead: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """One node's: it is to leave in `left_s` seconds, is `gone`, or has come."""

    node_id: str
    address: str
    left_s: float | None = None
    gone: str | None = None

    @property
    def name(self) -> str:
        return f"node {self.node_id[:8]}"


def changes(before: Nodes, after: Nodes) -> list[Change]:
    """What happened in between; a node that came and went unseen is none."""
    gone = before.alive.keys() - after.alive.keys()
    noticed = (after.draining.keys() & after.alive.keys()) - before.draining.keys()
    return [
        *(Change(node, after.alive[node]) for node in sorted(after.alive.keys() - before.alive.keys())),
        *(Change(node, after.alive[node], left_s=after.draining[node]) for node in sorted(noticed)),
        *(Change(node, before.alive[node], gone=after.dead.get(node) or "it vanished") for node in sorted(gone)),
    ]


def look() -> Nodes:
    """Ask Ray. Blocking, without a deadline."""
    rows: list[dict[str, Any]] = ray.nodes()
    deadlines_ms: dict[str, int] = cluster_state.get_draining_nodes()
    return Nodes(
        alive={row["NodeID"]: row["NodeManagerAddress"] for row in rows if row["Alive"]},
        draining={node: at / 1e3 - time.time() if at else math.inf for node, at in deadlines_ms.items()},
        dead={row["NodeID"]: row.get("DeathReasonMessage") or "" for row in rows if not row["Alive"]},
    )


async def watch(job: Job) -> None:
    """Tell what comes and goes, and move rollout workers in time; the ranks move between two steps, by `make_way`.

    Ends only by raising. Waits for Ray's answers, and beside that for drained workers, each until its node goes.

    Raises:
        NoAnswer: Ray did not say within `deadlines.nodes_s` which nodes there are: its head is gone.
    """
    seen = await _look(job)
    last = Nodes(seen.alive, {}, {})  # one may drain since before the run began
    async with asyncio.TaskGroup() as drains:
        while True:
            for change in changes(last, seen):
                drains.create_task(_apply(job, change))
            await asyncio.sleep(_LOOK_AGAIN_S)
            last, seen = seen, await _look(job)


async def make_way(job: Job) -> None:
    """Between two steps: if the learner, or this process, is on a node that leaves, a checkpoint, and then new ranks.

    Where the step took longer than the notice, the node and its ranks are gone, and the learner repairs itself.
    """
    leaving = {node for node, goes in job.leaving.items() if goes > now()}
    here = _own_node()
    if not leaving & {here, *job.learner.node_ids}:
        return
    cause = f"node {min(leaving & {here, *job.learner.node_ids})[:8]} leaves"
    if job.last_checkpoint is None or job.last_checkpoint.step != job.version:
        await recover.checkpoint_or_later(job, cause=cause)
    if leaving & set(job.learner.node_ids):
        await job.learner.move(cause)
    job.leaving.pop(here, None)  # nothing more can be done about this process


async def _look(job: Job) -> Nodes:
    asked = "list the nodes of the cluster"
    return await answer(asyncio.to_thread(look), who="Ray", asked=asked, deadline_s=job.config.deadlines.nodes_s)


async def _apply(job: Job, change: Change) -> None:
    node, where = change.node_id, change.address
    if change.gone is not None:
        announced = job.leaving.pop(node, None) is not None
        cause = "it leaves, as announced" if announced else change.gone
        _tell(job, Event("death", change.name, cause, _of_ours(job, node, "is replaced"), where))
        await job.pool.drain_node(node, f"{change.name} is gone", 0.0)
    elif change.left_s is not None:
        said = math.isfinite(change.left_s)
        left_s = change.left_s if said else _UNKNOWN_DEADLINE_S
        job.leaving[node] = now() + left_s
        when = f"in {left_s:.0f} s" if said else "soon"
        consequence = _of_ours(job, node, "moves")
        if node == _own_node():
            consequence += "; the run itself is there: it writes a checkpoint, start it elsewhere with resume=true"
        _tell(job, Event("drain", change.name, f"it leaves {when}", consequence, where))
        await job.pool.drain_node(node, f"{change.name} leaves {when}", left_s)
    else:
        _tell(job, Event("start", change.name, "", "has joined", where))


def _of_ours(job: Job, node: str, what_happens: str) -> str:
    workers = [worker.actor_id for worker in job.pool.workers if worker.node_id == node]
    ranks = [f"learner rank {rank}" for rank, place in enumerate(job.learner.node_ids) if place == node]
    return "; ".join(f"{name} {what_happens}" for name in (*workers, *ranks)) or "no worker of the run is on it"


def _own_node() -> str:
    context = ray.get_runtime_context()
    return str(context.get_node_id())


def _tell(job: Job, event: Event) -> None:
    job.log.event(event)
    job.progress.note(" ".join(filter(None, (event.who, event.cause, event.consequence))))
