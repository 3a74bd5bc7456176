"""Why an actor has no node: what it asks for, what the nodes have of it, and how much there may ever be."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import state as ray_state

from contracts.waiting import NoAnswer, answer

_SLACK = 1e-6  # shares of a GPU do not add up exactly


@dataclass(frozen=True)
class Room:
    """What one node has of each resource, by Ray's names, and what of it is free."""

    has: Mapping[str, float]
    free: Mapping[str, float]


async def missing(asked: Mapping[str, float], *, deadline_s: float) -> str:
    """What an actor that asks for this waits for, in words."""
    looked = asyncio.to_thread(look)
    try:
        rooms, may_start = await answer(looked, who="Ray", asked="list what is free", deadline_s=deadline_s)
    except NoAnswer as error:
        return f"waits for a node; {error}"
    return waits_for(asked, rooms, may_start)


def look() -> tuple[list[Room], dict[str, float]]:
    """The nodes that live, and the most of each resource that an autoscaler may start. Asks Ray; blocking."""
    free = ray_state.available_resources_per_node()
    rows = [row for row in ray.nodes() if row["Alive"]]
    rooms = [Room(row["Resources"], free.get(row["NodeID"], {})) for row in rows]
    return rooms, {
        name: float(most) for name, most in (ray_state.get_max_resources_from_cluster_config() or {}).items()
    }


def waits_for(asked: Mapping[str, float], rooms: Sequence[Room], may_start: Mapping[str, float]) -> str:
    """In words: "waits for 1 GPU on a node with resource rollout; none free, limit 4".

    The node is one that has all the custom resources that are asked for. What is missing is what no such node has
    free; the limit is what all of them have, or an autoscaler may start.
    """
    custom = {name: amount for name, amount in asked.items() if name not in ("CPU", "GPU") and amount}
    kind = f" with resource {' and '.join(sorted(custom))}" if custom else ""
    fitting = [room for room in rooms if all(_has(room.has, name, amount) for name, amount in custom.items())]
    lacking = {
        name: amount
        for name, amount in asked.items()
        if amount and not any(_has(room.free, name, amount) for room in fitting)
    } or {name: amount for name, amount in asked.items() if amount}  # each is free somewhere, but not together
    what = ", ".join(f"{amount:g} {name}" for name, amount in sorted(lacking.items()) if name not in custom)
    if not what:
        what = ", ".join(f"{amount:g} of resource {name}" for name, amount in sorted(lacking.items()))
        kind = ""
    if not fitting:
        starts = [f"{may_start[name]:g} {name}" for name in sorted(custom) if may_start.get(name)]
        there = f"none is up, the autoscaler may start up to {', '.join(starts)}" if starts else "there is none"
        return f"waits for {what} on a node{kind}; {there}"
    free = {name: max((room.free.get(name, 0.0) for room in fitting), default=0.0) for name in lacking}
    limit = {name: max(sum(room.has.get(name, 0.0) for room in fitting), may_start.get(name, 0.0)) for name in lacking}
    return f"waits for {what} on a node{kind}; {_amounts(free)} free, limit {_amounts(limit, zero='0')}"


def _has(there: Mapping[str, float], name: str, amount: float) -> bool:
    return there.get(name, 0.0) >= amount - _SLACK


def _amounts(of: Mapping[str, float], zero: str = "none") -> str:
    """Only the number where there is one resource."""
    if len(of) == 1:
        return next((f"{amount:g}" for amount in of.values() if amount > _SLACK), zero)
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(of.items()))
