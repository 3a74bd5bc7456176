"""A process with a real cluster whose nodes claim GPUs: where an engine over four goes, and learner ranks that move.

Prints what was seen as JSON. In a process of its own, because a process has one Ray.
"""

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

from tests.nodes import NodeCluster, prepare

WAIT_S = 120.0


async def engine_over_four(cluster: NodeCluster, model: Path) -> dict[str, Any]:
    """Two nodes with two GPUs cannot have it, the one with four that comes later does."""
    import ray

    from actors.pool import RolloutPool
    from cluster.capacity import check_capacity
    from contracts.config import ConfigError, DeadlinesConfig, ModelConfig
    from contracts.events import Event
    from contracts.loading import validate
    from contracts.workers import RolloutConfig
    from tests.actors.scripted import ScriptedActor

    four = {"num_gpus": 4, "tensor_parallel_size": 4}
    settings = {
        "output_dir": "unused",
        "model": {"path": str(model)},
        "prompts": {"path": "unused.jsonl"},
        "rewards": [{"name": "length", "function": "my.rewards:length"}],
        "rollout": four,
    }
    refused = ""
    try:
        check_capacity(validate(settings, source="a test"))
    except ConfigError as error:
        refused = str(error)
    two = RolloutConfig(num_workers=2, num_cpus=0.1, num_gpus=2, tensor_parallel_size=2)
    events: list[Event] = []
    deadlines = DeadlinesConfig(place_s=1.0, start_s=WAIT_S)
    model_settings = ModelConfig(path=str(model))

    def pool_of(config: RolloutConfig) -> RolloutPool:
        pool = RolloutPool(
            model_settings, config, deadlines, path=str(model), version=0, seed=0, actor_class=ScriptedActor
        )
        pool.on_change = events.append
        return pool

    async def gpus(pool: RolloutPool) -> list[tuple[str, list[int]]]:
        asked = [worker.handle.__ray_call__.remote(lambda actor: ray.get_gpu_ids()) for worker in pool.workers]
        found = [await asyncio.wait_for(each, WAIT_S) for each in asked]
        return [(worker.node_id, sorted(ids)) for worker, ids in zip(pool.workers, found, strict=True)]

    waits = pool_of(RolloutConfig(num_workers=1, num_cpus=0.1, **four))  # type: ignore[arg-type]
    starting = asyncio.create_task(waits.start())
    try:
        async with asyncio.timeout(WAIT_S):
            while not events:  # noqa: ASYNC110 told by a callback
                await asyncio.sleep(0.05)
        large = cluster.add(num_cpus=1, resources={}, num_gpus=4)
        await asyncio.wait_for(starting, WAIT_S)
    finally:
        starting.cancel()
    alone = await gpus(waits)
    await waits.stop()
    share = pool_of(two)
    await asyncio.wait_for(share.start(), WAIT_S)
    beside = await gpus(share)
    await share.stop()
    return {"refused": refused, "pending": events[0].cause, "large": large, "alone": alone, "beside": beside}


async def learner_that_moves(cluster: NodeCluster, model: Path, folder: Path, leaving: str) -> dict[str, Any]:
    """Two ranks on one node, which gives notice: one each on the two that stay, and no step is trained again."""
    from contracts.config import DeadlinesConfig
    from contracts.events import Event
    from contracts.workers import LearnerConfig
    from learner.group import LearnerGroup
    from learner.places import bundle_of, one_node_has_room
    from tests.learner.test_group import batch, settings

    events: list[Event] = []
    workers = LearnerConfig(num_ranks=2, num_cpus=0.1, threads=1, resources={"learner": 1.0})
    digests: list[str] = []
    nodes: list[list[str]] = []
    for moves in (False, True):
        async with asyncio.timeout(WAIT_S):
            # The first group's places are given back a little after its end.
            while not one_node_has_room(bundle_of(workers), 2):  # noqa: ASYNC110 another process
                await asyncio.sleep(0.05)
        group = LearnerGroup(
            settings(model), workers, DeadlinesConfig(start_s=WAIT_S), logged=batch, on_change=events.append
        )
        await group.ready()
        try:
            await group.step(batch(1), training_version=0)
            await group.publish(1)
            nodes.append(group.node_ids)
            if moves:
                await group.save(folder)
                group.checkpointed(1, folder / "state")
                cluster.drain(leaving, notice_s=WAIT_S)
                await group.move("its node leaves")
                nodes.append(group.node_ids)
                cluster.kill(leaving)
            await group.step(batch(2), training_version=1)
            update, _ = await group.publish(2)
            digests.append(update.digest)
        finally:
            group.stop()
    return {
        "digests": digests,
        "nodes": nodes,
        "told": [(event.event, event.who, event.consequence) for event in events],
    }


async def seen(cluster: NodeCluster, folder: Path, names: dict[str, str]) -> dict[str, Any]:
    import ray

    from tests.tiny import build_tiny_model

    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    model = build_tiny_model(folder / "model", tied=True)
    try:
        found = await learner_that_moves(cluster, model, folder / "checkpoint", names["leaving"])
        return found | await engine_over_four(cluster, model)
    finally:
        ray.shutdown()


def main() -> None:
    folder = Path(sys.argv[1])
    prepare(folder)
    cluster = NodeCluster(head_cpus=1)
    try:
        names = {
            "leaving": cluster.add(num_cpus=4, resources={"learner": 2}, num_gpus=2),
            "one": cluster.add(num_cpus=4, resources={"learner": 1}, num_gpus=2),
            "other": cluster.add(num_cpus=4, resources={"learner": 1}, num_gpus=2),
        }
        found = asyncio.run(seen(cluster, folder, names))
    finally:
        cluster.shutdown()
    print(json.dumps(names | found))


if __name__ == "__main__":
    main()
