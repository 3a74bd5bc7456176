"""The version keeper under Ray Serve: replicas follow training, in turns, through pins, rollbacks and its own death."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve

from actors.applications import delete_applications, run_application
from contracts.serving import GateConfig, ServingConfig
from models.engine_shadow import policy_tensors
from models.weight_stream import DeltaError, DeltaReceiver
from models.weights import digest
from serving.records import StartWeights, Verdict
from serving.versions import VersionKeeper
from tests.conftest import RunCoroutine
from tests.models.test_weight_stream import clone
from tests.serving.published import KEY, Trainer

pytestmark = pytest.mark.usefixtures("ray_session")


class Judge:
    """Stands for the gate: even versions are good enough. It takes a while."""

    async def holds(self) -> tuple[int, int]:
        return 0, 0

    async def judge(self, current: int, to_current: Any, candidate: int, to_candidate: Any) -> Verdict:
        await asyncio.sleep(0.5)
        return Verdict(candidate % 2 == 0, f"against version {current}", {"kl": 0.5})


class Here:
    """Calls of an object in this process as through a handle: what is tested without Serve starts at once."""

    def __init__(self, called: Any) -> None:
        self._called = called

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._called, name))


async def until(holds: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    expires = time.monotonic() + timeout_s
    while not await holds():
        assert time.monotonic() < expires
        await asyncio.sleep(0.05)


class Replica:
    """What a serving replica does but for its engine: it polls, drains for a while, takes weights, and proves them."""

    def __init__(self, name: str, keeper: Any, trainer: Trainer, *, slot: str = "live", drain_s: float = 0.05) -> None:
        self.name, self.slot, self._keeper, self._drain_s = name, slot, keeper, drain_s
        self._trainer = trainer
        self.tensors = clone(trainer.weights[0])
        self._receiver = DeltaReceiver(self.tensors, 0, key=KEY)
        self.version: int | None = 0
        self.draining = False
        self.served: list[int] = []
        self.told_alone: list[bool] = []
        self.damage_next = False

    async def follow(self) -> None:
        while True:
            order = await self._keeper.order.remote(self.slot, self.name, self.version, 0, 2.0)
            if order is None:
                continue
            self.draining = True
            self.told_alone.append(order.alone)
            await asyncio.sleep(self._drain_s)
            error = ""
            try:
                for update, refs in order.steps:
                    frames = await asyncio.gather(*refs)
                    if update.is_keyframe:
                        self._receiver.forget()
                    if self.damage_next:
                        self.damage_next, frames = False, [np.zeros_like(frame) for frame in frames]
                    self._receiver.apply(frames, update=update, sender="the keeper")
            except DeltaError as refused:
                error = str(refused)
            else:
                self.version = order.version
                self.served.append(order.version)
                expected = self._trainer.weights[order.version]
                assert digest(self.tensors) == digest(expected)
            self.draining = False
            await self._keeper.served.remote(self.slot, self.name, self.version, error)


class Ends:
    """Training, the keeper, and replicas."""

    def __init__(self, keeper: Any, trainer: Trainer, folder: Path) -> None:
        self.keeper, self.trainer, self.folder = keeper, trainer, folder
        self.replicas: list[Replica] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def publish(self, num: int = 1) -> bool:
        wanted = False
        for _ in range(num):
            wanted = await self.send(*self.trainer.delta())
        return wanted

    async def send(self, frames: Any, update: Any) -> bool:
        refs = [ray.put(np.frombuffer(frame, np.uint8)) for frame in frames]
        return bool(await self.keeper.publish.remote(update, refs))

    def start(self, *names: str, **options: Any) -> list[Replica]:
        made = [Replica(name, self.keeper, self.trainer, **options) for name in names]
        self.replicas += made
        self.tasks += [asyncio.ensure_future(replica.follow()) for replica in made]
        return made

    async def until_all_serve(self, version: int, timeout_s: float = 30.0) -> None:
        expires = time.monotonic() + timeout_s
        while {replica.version for replica in self.replicas} != {version}:
            for task in self.tasks:
                if task.done():
                    task.result()
            assert time.monotonic() < expires, [(replica.name, replica.version) for replica in self.replicas]
            await asyncio.sleep(0.02)


@asynccontextmanager
async def ends(model: Path, folder: Path, *, gated: bool = False, served: bool = False) -> AsyncIterator[Ends]:
    gate = GateConfig(prompts=Path("none.jsonl")) if gated else None
    config, start = ServingConfig(gate=gate), StartWeights(str(model), 0)
    if served:
        deployment: Any = serve.deployment(
            VersionKeeper, name="versions", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000
        )
        keeper: Any = await run_application(
            deployment.bind(config, folder, start, key=KEY), "test-versions", start_s=120
        )
    else:
        keeper = Here(VersionKeeper(config, folder, start, key=KEY, gate=Here(Judge()) if gated else None))  # type: ignore[arg-type]
    made = Ends(keeper, Trainer(start=policy_tensors(str(model), "bfloat16")), folder)
    try:
        yield made
    finally:
        for task in made.tasks:
            task.cancel()
        await asyncio.gather(*made.tasks, return_exceptions=True)
        if served:
            await delete_applications("test-versions", deadline_s=60)


def kill_keeper() -> None:
    (name,) = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if "#versions#" in each["name"]]
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)


def test_who_is_cancelled_as_news_come_does_not_wait_again(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    """asyncio.wait_for of Python 3.11 loses a cancellation in the turn of the loop in which what it waits for came."""

    async def check() -> None:
        async with ends(tiny_model, tmp_path) as all_:
            waiting = asyncio.ensure_future(all_.keeper.order.remote("live", "a", 0, 0, 60.0))
            await asyncio.sleep(0.1)
            await all_.keeper.served.remote("live", "b", 0)
            await asyncio.sleep(0)  # what it waits for is there, and it has not seen it yet
            waiting.cancel()
            await asyncio.wait([waiting], timeout=5)
            assert waiting.cancelled()

    run(check())


def test_who_leaves_while_it_waits_for_orders_is_gone(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    """Its question stays with the keeper when its process has ended, and must not take a turn with it."""

    async def check() -> None:
        async with ends(tiny_model, tmp_path) as all_:
            asked = asyncio.ensure_future(all_.keeper.order.remote("live", "gone", 0, 0, 2.5))
            await asyncio.sleep(0.1)
            await all_.keeper.leave.remote("live", "gone")
            all_.start("stays")
            await all_.publish()
            await all_.until_all_serve(1, timeout_s=2.0)
            assert all_.replicas[0].told_alone == [True]
            assert [each["replica"] for each in (await all_.keeper.status.remote())["replicas"]] == ["stays"]
            assert await asked is None

    run(check())


def test_replicas_follow_in_turns_and_an_old_and_a_new_one_get_there(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        async with ends(tiny_model, tmp_path) as all_:
            all_.start("a", "b", "c", "d", drain_s=0.3)
            await asyncio.sleep(0.5)
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, sum(replica.draining for replica in all_.replicas))
                    await asyncio.sleep(0.01)

            watcher = asyncio.ensure_future(watch())
            for _ in range(4):
                await all_.publish()
                await asyncio.sleep(0.2)
            await all_.until_all_serve(4)
            watcher.cancel()
            assert most == 2
            assert not any(any(replica.told_alone) for replica in all_.replicas)
            (new,) = all_.start("new")
            await all_.until_all_serve(4)
            assert new.served == [4]  # by the whole chain, at once
            status = await all_.keeper.status.remote()
            assert (status["current"], status["newest"], status["follow"], status["held"]) == (4, 4, "latest", False)
            assert status["versions"] == [0, 1, 2, 3, 4]
            assert {(each["slot"], each["version"]) for each in status["replicas"]} == {("live", 4)}

    run(check())


@pytest.mark.slow
def test_a_rollback_holds_and_its_keeper_may_die_meanwhile(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    async def check() -> None:
        async with ends(tiny_model, tmp_path, served=True) as all_:
            (live,) = all_.start("a")
            (pinned,) = all_.start("p", slot="pinned-2")
            await all_.publish(3)

            async def there() -> bool:
                return (live.version, pinned.version) == (3, 2)

            await until(there)
            assert live.told_alone
            assert all(live.told_alone)
            all_.replicas.remove(pinned)
            status = await all_.keeper.rollback.remote(1)
            assert (status["current"], status["held"]) == (1, True)
            await all_.until_all_serve(1)
            for task in all_.tasks:
                task.cancel()
            kill_keeper()
            all_.tasks = []
            frames, update = all_.trainer.delta()

            async def taken() -> bool:
                try:
                    await all_.send(frames, update)
                except ray.exceptions.RayActorError:
                    return False
                return True

            await until(taken)
            history = [(row.version, row.status) for row in await all_.keeper.history.remote()]
            assert history[-2:] == [(1, "rolled_back"), (all_.trainer.version, "published")]
            status = await all_.keeper.status.remote()
            assert (status["current"], status["held"]) == (1, True)
            all_.tasks = [asyncio.ensure_future(live.follow())]
            await all_.keeper.pin.remote("0")  # back to what replicas began with
            await all_.until_all_serve(0)
            await all_.keeper.pin.remote("latest")
            await all_.until_all_serve(all_.trainer.version)
            rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
            assert [row["status"] for row in rows[-3:]] == ["pinned", "released", "promoted"]
            with pytest.raises(ValueError, match="the weights of version 77 are not here; there are 0 to"):
                await all_.keeper.pin.remote("77")
            with pytest.raises(ValueError, match="version 77 is not older than version"):
                await all_.keeper.rollback.remote(77)

    run(check())


def test_a_refused_delta_is_followed_by_a_keyframe(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    async def check() -> None:
        async with ends(tiny_model, tmp_path) as all_:
            (live,) = all_.start("a")
            live.damage_next = True
            await all_.publish(1)
            await all_.until_all_serve(1)
            path = tmp_path / "events.jsonl"

            async def both_told() -> bool:
                return len(path.read_text().splitlines()) == 2

            await until(both_told)
            events = [json.loads(line) for line in path.read_text().splitlines()]
            assert [event["event"] for event in events] == ["refusal", "rollover"]
            assert "weights version 1 from the keeper refused" in events[0]["cause"]

    run(check())


def test_damaged_weights_are_told_and_a_keyframe_heals_them(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        async with ends(tiny_model, tmp_path) as all_:
            await all_.publish(2)
            path = tmp_path / "weights" / "version-000002-delta.frames"
            path.write_bytes(path.read_bytes()[:-5])
            all_.start("a")

            async def told() -> bool:
                return bool((await all_.keeper.status.remote())["problems"])

            await until(told)
            (problem,) = (await all_.keeper.status.remote())["problems"]
            assert "version 2 cannot be served: the weights of version 2 are not in" in problem
            assert await all_.publish() is True  # builds on what is lost
            assert await all_.send(*all_.trainer.keyframe()) is False
            await all_.until_all_serve(3)
            assert (await all_.keeper.status.remote())["problems"] == []

    run(check())


def test_a_slow_gate_judges_the_newest_and_skips_the_others(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        async with ends(tiny_model, tmp_path, gated=True) as all_:
            all_.start("a")
            await all_.publish(6)  # while it judges the first
            await all_.until_all_serve(6)
            await all_.publish(1)

            async def refused() -> bool:
                return bool((await all_.keeper.history.remote())[-1].status == "refused")

            await until(refused)
            rows = await all_.keeper.history.remote()
            judged = [(row.version, row.status, row.reason) for row in rows if row.metrics]
            assert judged[-2:] == [(6, "promoted", "against version 0"), (7, "refused", "against version 6")]
            assert len(judged) < 6
            assert all_.replicas[0].version == 6

    run(check())
