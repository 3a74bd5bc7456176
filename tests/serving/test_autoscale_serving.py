"""Under load Ray Serve adds an engine, afterwards it takes one away: real engines, behind an ingress that listens."""

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from actors.applications import delete_application, run_application
from contracts.serving import ServingConfig
from serving.app import Policy, build
from serving.records import LIVE, StartWeights
from tests.conftest import RunCoroutine
from tests.serving.test_application import SMALL, Application
from tests.serving.test_gate_engine import nudged

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

CALLERS, PLACES = 6, 4
SHORT, LONG = 60, 200


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Callers:
    """What HTTP callers are answered."""

    def __init__(self, client: httpx.AsyncClient, served: Application) -> None:
        self.client, self.served = client, served
        self.statuses: Counter[int] = Counter()
        self.asked_and_refused: list[tuple[float, bool]] = []  # when, and whether it was refused
        self.wrong: list[str] = []
        self.lowest = 0  # the version that every replica has reached

    async def stream(self, num_tokens: int = SHORT) -> int | None:
        """The version of an answer, of which every token has come and is of that version; None if it was refused."""
        began, lowest = time.monotonic(), self.lowest
        body = {
            "model": "crowd",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            self.statuses[response.status_code] += 1
            self.asked_and_refused.append((began, response.status_code == 503))
            if response.status_code != 200:
                await response.aread()
                return None
            said = b"".join([part async for part in response.aiter_bytes()])  # its lines may hold any of Unicode's ends
        version = int(response.headers["X-Weights-Version"])
        lines = [event.removeprefix("data: ") for event in said.decode().split("\n\n") if event]
        whole = lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]] if whole else []
        tokens = events[-1]["usage"]["completion_tokens"] if whole and "usage" in events[-1] else 0
        versions = {event.get("weights_version", version) for event in events}
        if tokens != num_tokens or versions != {version} or version < lowest:
            self.wrong.append(f"{tokens} of {num_tokens} tokens, {versions}, {lowest} was everywhere: {lines[-1]}")
        return version

    async def keep_asking(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            if await self.stream() is None:
                await asyncio.sleep(0.2)


@asynccontextmanager
async def listening(config: ServingConfig, model: Path, folder: Path) -> AsyncIterator[Callers]:
    policy = Policy(StartWeights(str(model), 0), 256)
    bound = build(config, policy, folder, scorers={}, start_s=480, health_s=20, listens=True)
    try:
        await run_application(bound, config.application, start_s=500)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{config.port}", timeout=120) as client:
            yield Callers(client, Application(config, model, folder))
    finally:
        await delete_application(config.application, deadline_s=90)


async def until_engines(config: ServingConfig, states: dict[str, int], timeout_s: float = 240.0) -> None:
    """So many in each state, and no others."""
    async with asyncio.timeout(timeout_s):
        while True:
            status = await asyncio.to_thread(serve.status)
            if status.applications[config.application].deployments[LIVE].replica_states == states:
                return
            await asyncio.sleep(0.1)


def test_one_engine_grows_to_two_under_load_and_shrinks_back(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    replicas: dict[str, Any] = SMALL | {
        "threads": 1,
        "max_replicas": 2,
        "max_running": PLACES,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 1.0,
    }
    config = ServingConfig.model_validate(
        {"name": "crowd", "port": free_port(), "replicas": replicas, "limits": {"max_waiting": 1}, "request_s": 60.0}
    )

    async def check() -> None:
        async with listening(config, tiny_model, tmp_path / "serving") as callers:
            served, stop = callers.served, asyncio.Event()

            async def publish() -> int:
                await served.publish(nudged(served.trainer.weights[served.trainer.version], 0.02))
                return served.trainer.version

            async def everywhere(num: int) -> None:
                version = await publish()

                def reached(status: dict[str, Any]) -> bool:
                    serving = [each["version"] for each in status["replicas"] if each["state"] == "serving"]
                    return len(serving) >= num and set(serving) == {version}

                await served.until(reached)
                callers.lowest = version

            asking = [asyncio.create_task(callers.keep_asking(stop)) for _ in range(CALLERS)]
            await everywhere(1)
            assert callers.statuses[503] > 0  # six ask, four have a place and one may wait
            await until_engines(config, {"RUNNING": 1, "STARTING": 1})
            await everywhere(1)  # while the second one starts from version 0
            await until_engines(config, {"RUNNING": 2})
            await everywhere(2)
            began = time.monotonic() + 2.0  # when the ingress knows of its places
            for _ in range(3):
                await everywhere(2)
            await asyncio.sleep(5.0)
            late = [refused for when, refused in callers.asked_and_refused if when > began]
            assert len(late) > 2 * CALLERS
            assert not any(late)

            stop.set()
            await asyncio.gather(*asking)
            shrinking = asyncio.create_task(until_engines(config, {"RUNNING": 1}))
            versions: list[int | None] = []

            async def ask_on() -> None:
                while not shrinking.done():
                    versions.append(await callers.stream(LONG))

            await asyncio.gather(ask_on(), ask_on())  # one for each: the one that goes is writing
            await shrinking
            assert None not in versions
            assert callers.wrong == []
            ends = time.monotonic()
            await served.until(lambda status: len(status["replicas"]) == 1, timeout_s=10.0)
            await everywhere(1)
            assert time.monotonic() - ends < 20.0  # and not the half minute of one that is silent
            assert await callers.stream() == served.trainer.version
            assert set(callers.statuses) == {200, 503}
            assert callers.statuses[200] > 50

    run(check(), timeout_s=800)
