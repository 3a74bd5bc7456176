"""Reward components on real Serve replicas: sharing, batching, bad samples, dead replicas, deadlines."""

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from ray import serve

from actors.reward import BadSample, RewardComponents, RewardHandle, Score, ScoreRequest, deploy_reward
from contracts.config import RewardConfig
from contracts.records import Prompt
from contracts.waiting import NoAnswer
from contracts.workers import ReplicaConfig
from tests.command import Processes
from tests.conftest import RunCoroutine

REPLICAS = ReplicaConfig(num_replicas=2, num_cpus=0.1, max_batch_size=8, batch_wait_s=0.2)


@pytest.fixture(scope="module")
def handles(ray_session: Processes, run: RunCoroutine) -> Iterator[list[RewardHandle]]:
    """Two components: `behave` on two replicas, weight 2, and `length` on one, weight -0.5."""

    async def deploy(name: str, weight: float, replicas: ReplicaConfig) -> RewardHandle:
        return await deploy_reward(
            RewardConfig(name=name, weight=weight, function=f"tests.actors.judges:{name}"),
            replicas,
            application=f"test-{name}",
            model_path=None,
            dtype="float32",
            max_tokens=64,
            start_s=240,
        )

    async def both() -> list[RewardHandle]:
        one = REPLICAS.model_copy(update={"num_replicas": 1})
        return list(await asyncio.gather(deploy("behave", 2.0, REPLICAS), deploy("length", -0.5, one)))

    handles = run(both(), timeout_s=300)
    yield handles
    for handle in handles:
        serve.delete(handle.application)


def prompt(do: str = "number", number: float = 1.0) -> Prompt:
    columns = {"do": do, "number": number, "unasked": "x"}
    return Prompt("p0", [1, 2], "a question", [{"role": "user", "content": "a question"}], columns=columns)


async def scores(handle: RewardHandle, *requests: tuple[str, float], deadline_s: float = 60) -> list[Score]:
    asked = (ScoreRequest([], "a question", "yes", {"do": do, "number": number}) for do, number in requests)
    return list(await asyncio.gather(*(handle.score(request, deadline_s=deadline_s) for request in asked)))


def test_both_replicas_get_work_and_batch_it(handles: list[RewardHandle], run: RunCoroutine) -> None:
    answers = run(scores(handles[0], *[("batch size", 0.0)] * 64))
    assert len({score.replica for score in answers}) == 2
    sizes = [score.value for score in answers]
    assert max(sizes) == REPLICAS.max_batch_size
    # Each batch of n answers n requests with n: the sum of 1/n counts the batches.
    assert sum(1 / size for size in sizes) < 24
    assert {score.version for score in answers} == {"tests.actors.judges:behave"}


def test_a_bad_sample_spoils_no_other_one_of_its_batch(handles: list[RewardHandle], run: RunCoroutine) -> None:
    asked = [("raise", 0.0) if i == 3 else ("nan", 0.0) if i == 5 else ("number", float(i)) for i in range(8)]
    answers = run(scores(handles[0], *asked))
    assert [score.error for score in answers] == [
        "ValueError: no taste" if i == 3 else "the score is nan" if i == 5 else "" for i in range(8)
    ]
    assert [score.value for i, score in enumerate(answers) if i not in (3, 5)] == [0.0, 1.0, 2.0, 4.0, 6.0, 7.0]


def test_the_reward_is_the_weighted_sum_and_keeps_its_parts(handles: list[RewardHandle], run: RunCoroutine) -> None:
    rewards = RewardComponents(handles, deadline_s=60)
    total, components, version = run(rewards.score(prompt(number=10.0), "seven c"))
    assert components == {"behave": 10.0, "length": 7.0}
    assert total == 2 * 10.0 - 0.5 * 7.0
    assert version == "tests.actors.judges:behave+tests.actors.judges:length"


@pytest.mark.parametrize(
    ("do", "reason"),
    [("raise", "component behave: ValueError: no taste"), ("nan", "component behave: the score is nan")],
)
def test_what_cannot_be_scored_is_a_bad_sample_with_its_reason(
    handles: list[RewardHandle], run: RunCoroutine, do: str, reason: str
) -> None:
    with pytest.raises(BadSample, match=reason):
        run(RewardComponents(handles, deadline_s=60).score(prompt(do), "yes"))


def test_a_late_component_is_named(handles: list[RewardHandle], run: RunCoroutine) -> None:
    with pytest.raises(NoAnswer, match=r"reward component behave did not answer within 0\.5 s"):
        run(RewardComponents(handles, deadline_s=0.5).score(prompt("sleep", 2.0), "yes"))


def test_requests_of_a_killed_replica_are_answered_by_the_other(handles: list[RewardHandle], run: RunCoroutine) -> None:
    async def kill_while_scoring() -> tuple[list[Score], str]:
        answer = (await scores(handles[0], ("process", 0.0)))[0]
        asked = asyncio.ensure_future(scores(handles[0], *[("sleep", 0.05)] * 48))
        await asyncio.sleep(0.4)
        assert not asked.done()
        os.kill(int(answer.value), signal.SIGKILL)
        return await asked, answer.replica

    answers, killed = run(kill_while_scoring())
    assert [score.value for score in answers] == [0.05] * 48
    assert {score.error for score in answers} == {""}
    assert {score.replica for score in answers} - {killed}


def test_the_same_function_may_be_two_components(handles: list[RewardHandle], run: RunCoroutine) -> None:
    again = replace(handles[1], config=RewardConfig(name="longer", weight=3.0, function="tests.actors.judges:length"))
    rewards: Any = RewardComponents([handles[1], again], deadline_s=60)
    assert run(rewards.score(prompt(), "four"))[:2] == (2.5 * 4, {"length": 4.0, "longer": 4.0})
