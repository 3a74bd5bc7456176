"""One rollout actor with a real engine: single answers, versions, and weights that arrive damaged."""

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.torch import load_file, save_file

from actors.delivery import WeightsAnswer
from actors.rollout import RolloutRequest
from contracts.config import Config
from contracts.records import Rollout
from tests.actors.direct import response_logprobs
from tests.actors.rollouts import MAX_LOGPROB_ERROR, PROMPT, published, request, running_pool
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.tiny import build_tiny_model

EOS = 2


KEY = b"the run's own"


@pytest.fixture(scope="module")
def actor(ray_session: Processes, tiny_config: Config, run: RunCoroutine) -> Iterator[Any]:
    with running_pool(tiny_config, run, weights_key=KEY) as pool:
        yield pool.workers[0].handle


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "other", tied=True, seed=1)


@pytest.fixture(scope="module")
def third_model(other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other one with a few values doubled: so few that only they are sent."""
    folder = shutil.copytree(other_model, tmp_path_factory.mktemp("models") / "third")
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[::50] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def generate(actor: Any, *requests: RolloutRequest) -> list[Rollout]:
    return list(await asyncio.gather(*(actor.generate.remote(each) for each in requests)))


async def load(actor: Any, update: Any, payload: Any) -> WeightsAnswer:
    said: WeightsAnswer = await actor.load_weights.remote(update, payload, deadline_s=60)
    return said


def flipped(payload: Any) -> Any:
    """The frames with one bit of the last one turned."""
    frame = np.array(ray.get(payload[-1]))
    frame[len(frame) // 2] ^= 1
    return [*payload[:-1], ray.put(frame)]


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


def test_weights_that_are_not_the_runs_own_are_refused_and_the_old_ones_served_on(
    actor: Any, tiny_model: Path, other_model: Path, run: RunCoroutine
) -> None:
    """The sender is named, the reason given, and no such update harms the next good one."""

    async def damaged() -> list[WeightsAnswer]:
        update, payload = published(other_model, 1, base=tiny_model, key=KEY)
        return [
            await load(actor, *each)
            for each in [
                (update, flipped(payload)),
                (update, payload[:-1]),
                (update, payload[::-1]),
                published(other_model, 1, base=tiny_model, key=b"somebody else's"),
                (replace(update, base_version=3, version=4), payload),
            ]
        ]

    answers = run(damaged())
    assert [said.version for said in answers] == [0] * 5
    assert all("from learner rank 0 refused: " in said.refused for said in answers), answers
    (rollout,) = run(generate(actor, request("after", max_tokens=40)))
    assert set(rollout.weights_versions) == {0}
    assert_logprobs_of(tiny_model, rollout, temperature=1.0)


def test_good_weights_are_served_and_named(actor: Any, tiny_model: Path, other_model: Path, run: RunCoroutine) -> None:
    """What changed, and then all of it again as a keyframe; both in the middle of responses."""

    async def update_while_running(name: str, update: Any, payload: Any) -> list[Rollout]:
        running = asyncio.ensure_future(generate(actor, *(request(f"{name}-{i}", seed=i) for i in range(8))))
        await asyncio.sleep(0.05)
        said = await load(actor, update, payload)
        assert (said.version, said.refused) == (update.version, "")
        assert 0 < said.held_s < 60
        return [*await running, *await generate(actor, request(f"{name}-new", max_tokens=40))]

    for old, new, update, model in [
        (0, 1, published(other_model, 1, base=tiny_model, key=KEY), other_model),
        (1, 7, published(tiny_model, 7, key=KEY), tiny_model),
    ]:
        *during, last = run(update_while_running(f"to-{new}", *update))
        assert set(last.weights_versions) == {new}
        assert_logprobs_of(model, last, temperature=1.0)
        # The bound can tell: under the old weights these tokens have clearly other log-probabilities.
        with pytest.raises(AssertionError):
            assert_logprobs_of(other_model if model == tiny_model else tiny_model, last, temperature=1.0)
        assert {old, new} <= {version for rollout in during for version in rollout.weights_versions}
        assert all(rollout.weights_versions == sorted(rollout.weights_versions) for rollout in during)


def test_an_update_that_comes_twice_or_late_changes_nothing(
    actor: Any, tiny_model: Path, other_model: Path, run: RunCoroutine
) -> None:
    for version in (7, 5):
        said = run(load(actor, *published(other_model, version, key=KEY)))
        assert said.version == 7
        assert "refused" in said.refused
    (rollout,) = run(generate(actor, request("still", max_tokens=40)))
    assert set(rollout.weights_versions) == {7}
    assert_logprobs_of(tiny_model, rollout, temperature=1.0)


def test_a_delta_that_was_made_from_other_weights_is_found_out_and_healed_by_a_keyframe(
    actor: Any, tiny_model: Path, other_model: Path, third_model: Path, run: RunCoroutine
) -> None:
    """It names the right base version, so only the digests tell; meanwhile the engine serves what it served."""
    said = run(load(actor, *published(third_model, 8, base=other_model, base_version=7, key=KEY)))
    assert said.version == 7
    assert "weights version 8 from learner rank 0 refused: " in said.refused
    (rollout,) = run(generate(actor, request("unharmed", max_tokens=40)))
    assert set(rollout.weights_versions) == {7}
    assert_logprobs_of(tiny_model, rollout, temperature=1.0)
    said = run(load(actor, *published(third_model, 8, key=KEY)))
    assert (said.version, said.refused) == (8, "")
    (rollout,) = run(generate(actor, request("healed", max_tokens=40)))
    assert set(rollout.weights_versions) == {8}
    assert_logprobs_of(third_model, rollout, temperature=1.0)
