"""One rollout actor as its pool sees it: on its way, at work, or lost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayTaskError

from actors.line import Line
from contracts.clock import BusyClock, now
from contracts.events import first_line


class WorkerLost(RuntimeError):
    """A rollout actor died, went silent or had to leave while it held a request, which can be sent to another."""


class NodeLeaves(RuntimeError):
    """An actor came up on a node that is being drained."""


@dataclass(eq=False)
class Worker:
    """One rollout actor as the pool sees it; `busy` runs while it holds requests.

    `version` is the one it has proved. `update` runs while it is brought to a newer one. `node` is the address of its
    machine, `node_id` Ray's id of it. `deaths` is how many died in its place since one there gave a response. `index`
    is its place among `num_workers`, which a replacement takes over.
    """

    actor_id: str
    handle: Any
    version: int
    line: Line
    node: str = ""
    node_id: str = ""
    deaths: int = 0
    index: int = 0
    update: asyncio.Task[None] | None = None
    busy: BusyClock = field(default_factory=BusyClock)
    since: float = field(default_factory=now)


@dataclass(eq=False)
class Start:
    """A worker on its way into the place `index`, pauses between attempts included."""

    index: int
    placed: bool = False  # on a node
    task: asyncio.Task[None] | None = None


def cause_of(error: Exception) -> str:
    """As the cause of an event: of an error in another process the error itself, not where it was."""
    return first_line(error.cause if isinstance(error, RayTaskError) else error)
