"""One rollout actor with a real engine: single answers, versions, and weights that arrive damaged."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from actors.rollout import RolloutRequest
from contracts.config import Config
from contracts.records import Rollout
from tests.actors.direct import response_logprobs
from tests.actors.rollouts import MAX_LOGPROB_ERROR, PROMPT, published, request, running_pool
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.tiny import build_tiny_model

EOS = 2


@pytest.fixture(scope="module")
def actor(ray_session: Processes, tiny_config: Config, run: RunCoroutine) -> Iterator[Any]:
    with running_pool(tiny_config, run) as pool:
        yield pool.workers[0].handle


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "other", tied=True, seed=1)


async def generate(actor: Any, *requests: RolloutRequest) -> list[Rollout]:
    return list(await asyncio.gather(*(actor.generate.remote(each) for each in requests)))


async def load(actor: Any, update: Any, payload: Any) -> float:
    seconds: float = await actor.load_weights.remote(update, payload, deadline_s=60)
    return seconds


def assert_logprobs_of(folder: Path, rollout: Rollout, *, temperature: float) -> None:
    expected = response_logprobs(folder, PROMPT, rollout.response_tokens, temperature=temperature)
    errors = [abs(a - b) for a, b in zip(rollout.behavior_logprobs, expected, strict=True)]
    assert max(errors) < MAX_LOGPROB_ERROR


def test_a_short_response_overtakes_long_ones_sent_earlier(actor: Any, run: RunCoroutine) -> None:
    async def in_order_of_return() -> list[Rollout]:
        async def one(each: RolloutRequest) -> None:
            rollout = await actor.generate.remote(each)
            returned.append(rollout)

        returned: list[Rollout] = []
        long = [asyncio.ensure_future(one(request(f"long-{i}", seed=i))) for i in range(8)]
        await asyncio.sleep(0.05)
        await one(request("short", max_tokens=3))
        await asyncio.gather(*long)
        return returned

    names = [
        rollout.trajectory_id
        for rollout in run(in_order_of_return())
        if len(rollout.response_tokens) not in range(4, 100)
    ]
    assert len(names) > 4
    assert names[0] == "short"


def test_every_token_has_its_logprob_and_version(actor: Any, tiny_model: Path, run: RunCoroutine) -> None:
    rollouts = run(generate(actor, *(request(f"many-{i}", temperature=0.8, seed=i) for i in range(16))))
    for rollout in rollouts:
        tokens = rollout.response_tokens
        assert 0 < len(tokens) == len(rollout.behavior_logprobs) == len(rollout.weights_versions) <= 200
        assert set(rollout.weights_versions) == {0}
        assert (rollout.finish_reason == "stop") == (tokens[-1] == EOS)
        assert EOS not in tokens[:-1]
        assert rollout.actor_id == "rollout-0"
        assert_logprobs_of(tiny_model, rollout, temperature=0.8)
    assert len({tuple(rollout.response_tokens) for rollout in rollouts}) == 16


def test_damaged_weights_are_refused_and_the_old_ones_served_on(
    actor: Any, tiny_model: Path, other_model: Path, run: RunCoroutine
) -> None:
    async def damaged() -> None:
        update, payload = published(other_model, 1)
        with pytest.raises(RayTaskError, match=r"rollout-0: version 1 arrived damaged \(its digest differs\)"):
            await load(actor, replace(update, digest="0" * 64), payload)

    run(damaged())
    (rollout,) = run(generate(actor, request("after", max_tokens=40)))
    assert set(rollout.weights_versions) == {0}
    assert_logprobs_of(tiny_model, rollout, temperature=1.0)


def test_good_weights_are_served_and_named(actor: Any, tiny_model: Path, other_model: Path, run: RunCoroutine) -> None:
    async def update_while_running() -> list[Rollout]:
        running = asyncio.ensure_future(generate(actor, *(request(f"during-{i}", seed=i) for i in range(8))))
        await asyncio.sleep(0.05)
        assert 0 < await load(actor, *published(other_model, 7)) < 60
        return [*await running, *await generate(actor, request("new", max_tokens=40))]

    *during, new = run(update_while_running())
    assert set(new.weights_versions) == {7}
    assert_logprobs_of(other_model, new, temperature=1.0)
    # The bound can tell: under the old weights these tokens have clearly other log-probabilities.
    with pytest.raises(AssertionError):
        assert_logprobs_of(tiny_model, new, temperature=1.0)
    assert {0, 7} <= {version for rollout in during for version in rollout.weights_versions}
    assert all(rollout.weights_versions == sorted(rollout.weights_versions) for rollout in during)
