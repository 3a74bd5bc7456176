"""Which runs are alive on a shared cluster: Serve outlives them, and what dead ones left there has to be removed.

A run on a cluster of its own needs none of this: everything ends with its driver. Elsewhere it keeps an actor with its
id as name, which Ray ends when the driver ends, however it does.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import ray

from actors.applications import application_names, delete_applications
from contracts.waiting import answer

NAMESPACE = "headrace"
_RUN_ID = re.compile(r"headrace-[0-9a-f]{8}")


@ray.remote(num_cpus=0)
class Presence:
    """Does nothing; that it is there says that its run is."""

    def here(self) -> None:
        """Answered once it is."""


async def announce(run_id: str, *, deadline_s: float) -> Any:
    """Let others see that the run is alive, for as long as the caller keeps what is returned."""
    presence: Any = Presence.options(name=run_id, namespace=NAMESPACE)  # type: ignore[attr-defined]
    presence = presence.remote()
    await answer(presence.here.remote(), who=f"the presence of {run_id}", asked="start", deadline_s=deadline_s)
    return presence


async def reap(*, deadline_s: float) -> list[str]:
    """Delete the Serve applications of runs that are dead; returns the ids of those runs."""
    dead = await dead_runs(deadline_s=deadline_s)
    for run_id in dead:
        await delete_applications(f"{run_id}-", deadline_s=deadline_s)
    return dead


async def dead_runs(*, deadline_s: float) -> list[str]:
    """Runs that have Serve applications and are not alive."""
    names = await application_names(deadline_s)
    # Looked at after the applications: a run announces itself before it deploys any.
    present = asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
    actors: Any = await answer(present, who="Ray", asked="list its named actors", deadline_s=deadline_s)
    alive = {actor["name"] for actor in actors if actor["namespace"] == NAMESPACE}
    runs = {match.group() for name in names if (match := _RUN_ID.match(name))}
    return sorted(runs - alive)
