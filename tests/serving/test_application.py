"""Whole applications on a real Ray Serve: a gate, several replicas, and a pinned version."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve
from torch import Tensor
from transformers import AutoTokenizer

from actors.applications import delete_application, run_application
from actors.prompts import PromptRow, render
from contracts.serving import GateConfig, ServingConfig
from models.engine_adapters import AdapterSettings
from models.engine_shadow import policy_tensors
from serving.app import Policy, build
from serving.archive import weights_key
from serving.records import Head, PolicyRequest, StartWeights
from tests.conftest import RunCoroutine
from tests.models.test_weight_stream import sent
from tests.serving.published import Trainer
from tests.serving.test_gate_engine import Reward, nudged
from tests.tiny import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

SMALL: dict[str, Any] = {"kv_cache_gib": 0.1, "num_cpus": 0.1}


class Application:
    """One that runs, and the training that publishes into it."""

    def __init__(self, config: ServingConfig, model: Path, folder: Path) -> None:
        self.versions = serve.get_deployment_handle("versions", config.application)
        self._config = config
        self.trainer = Trainer(start=policy_tensors(str(model), "bfloat16"), key=weights_key(folder))

    async def publish(self, weights: Mapping[str, Tensor]) -> None:
        trainer = self.trainer
        trainer.version += 1
        trainer.weights[trainer.version] = {name: each.clone() for name, each in weights.items()}
        frames, update = sent(trainer.sender, trainer.weights[trainer.version], trainer.version)
        refs = [ray.put(np.frombuffer(bytes(frame), np.uint8)) for frame in frames]
        await self.versions.publish.remote(update, refs)

    async def replicas(self) -> list[tuple[str, int]]:
        """Slot and version of each."""
        status = await self.versions.status.remote()
        return sorted((each["slot"], each["version"]) for each in status["replicas"])

    async def until(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 90.0) -> dict[str, Any]:
        """The keeper's status, once that holds."""
        async with asyncio.timeout(timeout_s):
            while True:
                status: dict[str, Any] = await self.versions.status.remote()
                if condition(status):
                    return status
                await asyncio.sleep(0.1)

    async def stream(self, slot: str = "live", **settings: Any) -> AsyncIterator[Any]:
        """A Head, then the events of a streamed answer."""
        chat = {"messages": [{"role": "user", "content": "Hello"}], "seed": 5, "max_tokens": 8, "ignore_eos": True}
        request = PolicyRequest("chat", chat | settings | {"stream": True}, "answer", 60.0)
        handle: Any = serve.get_deployment_handle(slot, self._config.application).options(stream=True)
        async for part in handle.answer.remote(request):
            yield part

    async def ask(self, slot: str = "live", **settings: Any) -> tuple[Head, list[dict[str, Any]]]:
        parts = [part async for part in self.stream(slot, **settings)]
        return parts[0], events(parts[1:]) if parts[1:] else []


def events(parts: list[bytes]) -> list[dict[str, Any]]:
    *said, done = (event.removeprefix("data: ") for event in b"".join(parts).decode().split("\n\n") if event)
    assert done == "[DONE]"
    return [json.loads(event) for event in said]


@asynccontextmanager
async def application(
    config: ServingConfig, model: Path, folder: Path, adapters: AdapterSettings | None = None
) -> AsyncIterator[Application]:
    """One whose gate, where there is one, asks `Reward` on eight prompts."""
    rows = [
        PromptRow(f"p{i}", [{"role": "user", "content": f"Question {i}?"}], "test", columns={"poison": False})
        for i in range(8)
    ]
    prompts, _ = render(rows, AutoTokenizer.from_pretrained(model), system=None, max_prompt_tokens=200)
    policy, scorers = Policy(StartWeights(str(model), 0, adapters=adapters), 256), {"letter": (1.0, Reward())}
    bound = build(config, policy, folder, scorers=scorers, start_s=480, health_s=20, gate_prompts=prompts)
    try:
        await run_application(bound, config.application, start_s=500)
        yield Application(config, model, folder)
    finally:
        await delete_application(config.application, deadline_s=60)


def test_a_gate_promotes_one_version_and_refuses_another(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    """One passes the gate and is served; the other is refused and is not."""
    gate = GateConfig(prompts=tmp_path / "none.jsonl", max_response_tokens=16, max_reward_drop=1.0, max_kl=10.0)
    config = ServingConfig(name="gated", gate=gate, replicas=SMALL)  # type: ignore[arg-type]
    other = policy_tensors(str(build_tiny_model(tmp_path / "other", tied=True, seed=1)), "bfloat16")

    async def check() -> None:
        async with application(config, tiny_model, tmp_path / "serving") as served:
            assert (await served.ask())[0].version == 0
            await served.publish(nudged(served.trainer.weights[0], 0.02))
            status = await served.until(lambda status: status["current"] == 1 or status["candidate"] is None)
            assert status["current"] == 1
            await served.until(lambda status: status["replicas"][0]["version"] == 1)
            assert (await served.ask())[0].version == 1

            await served.publish(other)
            status = await served.until(lambda status: status["newest"] == 2 and status["candidate"] is None)
            assert status["current"] == 1
            *_, promoted, _, refused = await served.versions.history.remote()
            assert (promoted.version, promoted.status) == (1, "promoted")
            assert (refused.version, refused.status) == (2, "refused")
            assert "max_kl 10" in refused.reason
            assert refused.metrics["kl"] > 10.0
            assert refused.metrics["reward/letter"] == refused.metrics["reward"]
            assert (await served.ask())[0].version == 1

    run(check(), timeout_s=400)


def test_two_replicas_and_a_pinned_version(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    replicas = SMALL | {"min_replicas": 2, "max_replicas": 2}
    config = ServingConfig(name="pair", pinned=(1,), replicas=replicas, drain_s=30.0)  # type: ignore[arg-type]

    async def check() -> None:
        async with application(config, tiny_model, tmp_path / "serving") as served:
            await served.until(lambda status: len(status["replicas"]) == 3)
            head, _ = await served.ask("pinned-1")  # another version's answer would not be what was asked for
            assert (head.status, head.error and head.error["code"]) == (503, "version_not_here")
            for _ in range(3):
                await served.publish(nudged(served.trainer.weights[served.trainer.version], 0.02))
            stop = asyncio.Event()
            heads: list[Head] = []

            async def keep_asking() -> None:
                while not stop.is_set():
                    heads.append((await served.ask())[0])

            asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
            everywhere = [("live", 3), ("live", 3), ("pinned-1", 1)]
            await served.until(
                lambda status: sorted((each["slot"], each["version"]) for each in status["replicas"]) == everywhere
            )
            stop.set()
            await asyncio.gather(*asking)
            pinned, said = await served.ask("pinned-1")
            assert (pinned.status, pinned.version) == (200, 1)
            assert {each["model"] for each in said} == {"pair@1"}
            live = [(await served.ask())[0] for _ in range(12)]
            assert {head.version for head in live if head.status == 200} == {3}
            assert len({head.replica for head in live}) == 2  # both work
            # While they changed one after the other, somebody answered.
            assert {head.status for head in heads} <= {200, 503}
            assert all(head.draining for head in heads if head.status == 503)

    run(check(), timeout_s=400)


def test_who_waits_for_a_place_waits_in_the_replica(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    """Not in Serve's handle, which would look for a free place only now and then."""
    replicas = SMALL | {"max_running": 1}
    config = ServingConfig(name="queued", replicas=replicas, limits={"max_waiting": 3})  # type: ignore[arg-type]

    async def check() -> None:
        async with application(config, tiny_model, tmp_path / "serving") as served:
            await served.ask()
            (replica,) = (
                ray.get_actor(each["name"], namespace=each["namespace"])
                for each in ray.util.list_named_actors(all_namespaces=True)
                if f"{config.application}#live#" in each["name"]
            )
            asking = [asyncio.create_task(served.ask(max_tokens=200)) for _ in range(4)]
            most = 0
            while most < len(asking) and not all(each.done() for each in asking):
                most = max(most, await replica.get_num_ongoing_requests.remote())
            assert most == len(asking)
            assert {head.status for head, _ in await asyncio.gather(*asking)} == {200}

    run(check(), timeout_s=300)
