"""A process with a real cluster: one node drains, another dies, a third comes, while `cluster.nodes.watch` looks on.

Prints what the watch said and did as JSON. In a process of its own, because a process has one Ray.
"""

import asyncio
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.nodes import NodeCluster, prepare

LOOK_S = 30.0


class Recorder:
    """In the place of the run's pool, learner and log: says who is where, and keeps what it is told."""

    def __init__(self, places: dict[str, str], rank_nodes: list[str]) -> None:
        self.workers = [SimpleNamespace(actor_id=name, node_id=node) for name, node in places.items()]
        self.node_ids = rank_nodes
        self.events: list[Any] = []
        self.drained: list[tuple[str, float]] = []

    async def drain_node(self, node_id: str, cause: str, deadline_s: float) -> None:
        self.drained.append((node_id, deadline_s))

    def event(self, event: Any) -> None:
        self.events.append(event)

    def note(self, text: str) -> None:
        pass


async def watched(
    cluster: NodeCluster, draining: str, lost: str
) -> tuple[Recorder, dict[str, float], list[tuple[bool, float]]]:
    import ray

    from actors.placement import look
    from cluster import nodes
    from learner.places import one_node_has_room

    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    # Ray ends a draining node as soon as nothing runs there.
    actor: Any = ray.remote(num_cpus=0, resources={"first": 1})(Recorder)
    busy = actor.remote({}, [])
    ray.get(busy.note.remote("here"), timeout=LOOK_S)
    told = Recorder({"rollout-0": draining, "rollout-1": lost}, [draining])
    job: Any = SimpleNamespace(
        pool=told,
        learner=told,
        log=told,
        progress=told,
        leaving={},
        config=SimpleNamespace(deadlines=SimpleNamespace(nodes_s=LOOK_S)),
    )
    watching = asyncio.create_task(nodes.watch(job))

    async def until(count: int) -> None:
        async with asyncio.timeout(LOOK_S):
            while len(told.events) < count:
                if watching.done():
                    watching.result()
                await asyncio.sleep(0.05)

    def room() -> tuple[bool, float]:
        """For two ranks on one node, and the most of what they ask for that a worker could find on one."""
        return one_node_has_room({"learner": 1.0}, 2), look().largest("learner")

    await asyncio.sleep(2.0)  # it has looked at what is there
    rooms = [room()]
    cluster.drain(draining, notice_s=20)
    await until(1)
    rooms.append(room())
    left = dict(job.leaving)
    cluster.kill(draining)
    await until(2)
    await asyncio.to_thread(cluster.kill, lost)
    await until(3)
    cluster.add(num_cpus=1, resources={})
    await until(4)
    watching.cancel()
    left = {node: goes - asyncio.get_running_loop().time() for node, goes in left.items()}
    ray.shutdown()
    return told, left | {"still": float(len(job.leaving))}, rooms


def main() -> None:
    prepare(Path(sys.argv[1]))
    cluster = NodeCluster(head_cpus=1)
    try:
        draining = cluster.add(num_cpus=1, resources={"first": 1, "learner": 2})
        lost = cluster.add(num_cpus=1, resources={"learner": 1})
        told, left, rooms = asyncio.run(watched(cluster, draining, lost))
    finally:
        cluster.shutdown()
    events = [asdict(event) for event in told.events]
    found = {"draining": draining, "lost": lost, "events": events, "drained": told.drained, "left": left}
    print(json.dumps(found | {"rooms": rooms}))


if __name__ == "__main__":
    main()
