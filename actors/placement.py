"""Why an actor has no node: what it asks for, what the nodes have of it, and how much there may ever be."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray._private.state import state as ray_state

from contracts.waiting import NoAnswer, answer

_SLACK = 1e-6  # shares of a GPU do not add up exactly


@dataclass(frozen=True)
class Room:
    """What one node has of each resource, by Ray's names, and what of it is free."""

    has: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True)
class Cluster:
    """Its nodes, without those that leave; what a node of each kind has that an autoscaler may start, by Ray's names,
    and the most that it may start of each resource.
    """

    rooms: Sequence[Room]
    kinds: Sequence[Mapping[str, float]] = ()
    may_start: Mapping[str, float] = field(default_factory=dict)

    def could_hold(self, asked: Mapping[str, float]) -> bool:
        """Whether one node, were it empty, has all of it, or one that may be started."""
        return any(_holds(has, asked) for has in (*(room.has for room in self.rooms), *self.kinds))

    def largest(self, name: str) -> float:
        """The most of a resource that one node has, or one that may be started."""
        return max((has.get(name, 0.0) for has in (*(room.has for room in self.rooms), *self.kinds)), default=0.0)


async def missing(asked: Mapping[str, float], *, deadline_s: float) -> str:
    """What an actor that asks for this waits for, in words."""
    looked = asyncio.to_thread(look)
    try:
        cluster = await answer(looked, who="Ray", asked="list what is free", deadline_s=deadline_s)
    except NoAnswer as error:
        return f"waits for a node; {error}"
    return waits_for(asked, cluster)


def look() -> Cluster:
    """The cluster as it is. Asks Ray; blocking."""
    free, leaving = ray_state.available_resources_per_node(), ray_state.get_draining_nodes()
    rows = [row for row in ray.nodes() if row["Alive"] and row["NodeID"] not in leaving]
    config = ray_state.get_cluster_config()
    groups = config.node_group_configs if config is not None else ()
    return Cluster(
        [Room(row["Resources"], free.get(row["NodeID"], {})) for row in rows],
        [{name: float(amount) for name, amount in group.resources.items()} for group in groups if group.max_count],
        {name: float(most) for name, most in (ray_state.get_max_resources_from_cluster_config() or {}).items()},
    )


def waits_for(asked: Mapping[str, float], cluster: Cluster) -> str:
    """In words: "waits for 1 GPU on a node with resource rollout; none free, limit 4".

    The node is one that has all the custom resources that are asked for. What is missing is what no such node has
    free; the limit is what all of them have, or an autoscaler may start. An actor lives on one node: where none is
    large enough, that is said instead.
    """
    custom = {name: amount for name, amount in asked.items() if name not in ("CPU", "GPU") and amount}
    kind = f" with resource {' and '.join(sorted(custom))}" if custom else ""
    fitting = [room for room in cluster.rooms if _holds(room.has, custom)]
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
        starts = [f"{cluster.may_start[name]:g} {name}" for name in sorted(custom) if cluster.may_start.get(name)]
        there = f"none is up, the autoscaler may start up to {', '.join(starts)}" if starts else "there is none"
        return f"waits for {what} on a node{kind}; {there}"
    if not cluster.could_hold(asked):
        return f"waits for {what} on one node{kind}; no node is that large: {largest(asked, cluster)} at most"
    free = {name: max((room.free.get(name, 0.0) for room in fitting), default=0.0) for name in lacking}
    limit = {
        name: max(sum(room.has.get(name, 0.0) for room in fitting), cluster.may_start.get(name, 0.0))
        for name in lacking
    }
    return f"waits for {what} on a node{kind}; {_amounts(free)} free, limit {_amounts(limit, zero='0')}"


def largest(asked: Mapping[str, float], cluster: Cluster) -> str:
    """In words, the most that one node has of what is asked for too much of: "2 GPU"; of all where it is the sum."""
    amounts = {name: cluster.largest(name) for name, amount in asked.items() if amount}
    short = {name: most for name, most in amounts.items() if most < asked[name] - _SLACK}
    return ", ".join(f"{most:g} {name}" for name, most in sorted((short or amounts).items()))


def _holds(has: Mapping[str, float], asked: Mapping[str, float]) -> bool:
    return all(_has(has, name, amount) for name, amount in asked.items())


def _has(there: Mapping[str, float], name: str, amount: float) -> bool:
    return there.get(name, 0.0) >= amount - _SLACK


def _amounts(of: Mapping[str, float], zero: str = "none") -> str:
    """Only the number where there is one resource."""
    if len(of) == 1:
        return next((f"{amount:g}" for amount in of.values() if amount > _SLACK), zero)
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(of.items()))
