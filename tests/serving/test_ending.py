"""A replica that Ray Serve takes away finishes what it does, and the version keeper waits for the others only."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from actors.applications import delete_application, run_application
from contracts.serving import ServingConfig
from models.engine_shadow import policy_tensors
from serving.ending import ending
from serving.records import LIVE, StartWeights
from serving.versions import VersionKeeper
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.serving.published import KEY, Trainer
from tests.serving.test_versions import Ends, Here

pytestmark = pytest.mark.slow

CONFIG = ServingConfig.model_validate({"name": "ending", "replicas": {"max_replicas": 2}})
WORK_S = 10.0


class Worker:
    """Serve's part of a replica."""

    async def work(self, work_s: float) -> str:
        await asyncio.sleep(work_s)
        return serve.get_replica_context().replica_id.unique_id


@pytest.fixture
def workers(ray_session: Processes, run: RunCoroutine) -> Iterator[Any]:
    """Two, of which Serve finds after three seconds that one is enough."""
    deployment: Any = serve.deployment(
        Worker,
        name=LIVE,
        max_ongoing_requests=1,
        autoscaling_config={
            "initial_replicas": 2,
            "max_replicas": 2,
            "target_ongoing_requests": 2,
            "downscale_delay_s": 3.0,
        },
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.2,
    )
    yield run(run_application(deployment.bind(), CONFIG.application, start_s=120), timeout_s=150)
    run(delete_application(CONFIG.application, deadline_s=60))


def test_nobody_waits_for_one_that_finishes_its_last_answer(
    workers: Any, tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        assert await ending(CONFIG.application, LIVE) == await ending("of another name", LIVE) == []
        names = await asyncio.gather(*(workers.work.remote(0.5) for _ in range(2)))  # one each
        assert len(set(names)) == 2
        keeper = Here(VersionKeeper(CONFIG, tmp_path, StartWeights(str(tiny_model), 0), key=KEY))
        all_ = Ends(keeper, Trainer(start=policy_tensors(str(tiny_model), "bfloat16")), tmp_path)
        try:
            last = [asyncio.ensure_future(workers.work.remote(WORK_S)) for _ in range(2)]
            all_.start(*names)
            async with asyncio.timeout(WORK_S):
                while not (going := await ending(CONFIG.application, LIVE)):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                while len((await all_.keeper.status.remote())["replicas"]) == 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert not any(task.done() for task in last)
            assert len(going) == 1
            (stays,) = (replica for replica in all_.replicas if replica.name not in going)
            await all_.publish()
            async with asyncio.timeout(5.0):
                while stays.version != 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert stays.told_alone == [True]
            assert {replica.version for replica in all_.replicas} == {0, 1}
            assert sorted(await asyncio.gather(*last)) == sorted(names)  # it was let finish
        finally:
            for task in all_.tasks:
                task.cancel()

    run(check())
