"""Places for the ranks of a learner: bundles of one Ray placement group, all of them or none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from contracts.clock import now
from contracts.config import DeadlinesConfig
from contracts.events import Event
from contracts.waiting import NoAnswer, answer
from contracts.workers import LearnerConfig

_SLACK = 1e-6  # shares of a GPU do not add up exactly
_LOOK_AGAIN_S = 1

# Says what an actor that asks for this waits for: actors.placement.missing, which the learner may not import.
Missing = Callable[[Mapping[str, float]], Awaitable[str]]


def bundle_of(workers: LearnerConfig) -> dict[str, float]:
    """What one rank reserves, by Ray's names; empty for one that reserves nothing."""
    asked = {"CPU": workers.num_cpus, "GPU": workers.num_gpus, **workers.resources}
    return {name: amount for name, amount in asked.items() if amount}


class Places:
    """One place for each rank: on one node where one has room for all, else on as few as Ray finds.

    `reserve` waits for Ray, `deadlines.start_s` at most; after `deadlines.place_s` it tells what is missing.
    """

    def __init__(self, workers: LearnerConfig, deadlines: DeadlinesConfig, *, who: str, missing: Missing) -> None:
        self._bundle, self._size = bundle_of(workers), workers.num_ranks
        self._deadlines, self._who, self._missing = deadlines, who, missing
        self._group: PlacementGroup | None = None

    async def reserve(self, on_change: Callable[[Event], None]) -> None:
        """Take the places.

        Raises:
            NoAnswer: there is no room after `deadlines.start_s`; says what is missing. Nothing stays reserved.
        """
        if not self._bundle:
            return
        looked = asyncio.to_thread(one_node_has_room, self._bundle, self._size)
        nodes_s = self._deadlines.nodes_s
        together = await answer(looked, who="Ray", asked="list what is free", deadline_s=nodes_s)
        self._group = placement_group([self._bundle] * self._size, strategy="STRICT_PACK" if together else "PACK")
        begun, told = now(), ""
        try:
            while not await self._taken():
                waited_s = now() - begun
                if waited_s >= min(self._deadlines.place_s, self._deadlines.start_s) and not told:
                    told = await self._missing(self._bundle)
                    each = f"; for each of its {self._size} ranks" if self._size > 1 else ""
                    on_change(Event("pending", self._who, f"{told}{each}", "the run waits for it"))
                if waited_s >= self._deadlines.start_s:
                    raise NoAnswer(f"{self._who} {told}: no node took it in {waited_s:.0f} s")
        except BaseException:
            self.give_back()
            raise

    async def _taken(self) -> bool:
        """Whether it is; waits for a moment. In short turns, because a thread cannot be cancelled."""
        group = self._group
        assert group is not None
        looked = asyncio.to_thread(group.wait, _LOOK_AGAIN_S)
        nodes_s = self._deadlines.nodes_s
        return await answer(looked, who="Ray", asked=f"find nodes for {self._who}", deadline_s=nodes_s)

    def options(self, rank: int) -> dict[str, Any]:
        """Of the actor of that rank."""
        if self._group is None:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank)}

    def give_back(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def one_node_has_room(bundle: Mapping[str, float], size: int) -> bool:
    """Whether a single node that stays has `size` times that free. Asks Ray; blocking."""
    # Ray places nothing on a node that is being drained: counted, its room would be waited for in vain.
    free, leaving = ray_state.available_resources_per_node(), ray_state.get_draining_nodes()
    rooms = [free.get(row["NodeID"], {}) for row in ray.nodes() if row["Alive"] and row["NodeID"] not in leaving]
    return any(all(room.get(name, 0.0) >= size * amount - _SLACK for name, amount in bundle.items()) for room in rooms)
