"""Reference log-probabilities from a real Serve replica against transformers alone, one sequence at a time."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from ray import serve

from actors.reference import ReferenceModel, deploy_reference
from contracts.waiting import NoAnswer
from contracts.workers import ReplicaConfig
from tests.actors.direct import response_logprobs
from tests.command import Processes
from tests.conftest import RunCoroutine

TEMPERATURE = 0.7
TOLERANCE = 1e-4  # fp32 on both sides: batch shapes move the last bits


@pytest.fixture(scope="module")
def reference(ray_session: Processes, tiny_model: Path, run: RunCoroutine) -> Iterator[ReferenceModel]:
    deploy = deploy_reference(
        str(tiny_model),
        ReplicaConfig(num_cpus=0.1, threads=1, max_batch_size=8, batch_wait_s=0.2),
        application="test-reference",
        dtype="float32",
        temperature=TEMPERATURE,
        start_s=240,
        score_s=60,
    )
    yield run(deploy, timeout_s=300)
    serve.delete("test-reference")


def sequences() -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of very different lengths."""
    random = Random(0)
    lengths = [(1, 1), (3, 40), (60, 2), (17, 100), (100, 17), (8, 8), (2, 150), (30, 1)]
    return [tuple([random.randrange(3, 320) for _ in range(n)] for n in both) for both in lengths]  # type: ignore[misc]


def test_they_are_those_of_a_direct_forward_whatever_shares_the_batch(
    reference: ReferenceModel, tiny_model: Path, run: RunCoroutine
) -> None:
    async def together() -> list[list[float]]:
        return list(await asyncio.gather(*(reference.logprobs(*pair) for pair in sequences())))

    async def alone() -> list[list[float]]:
        return [await reference.logprobs(*pair) for pair in sequences()]

    for found in (run(together()), run(alone())):
        for (prompt, response), logprobs in zip(sequences(), found, strict=True):
            expected = response_logprobs(tiny_model, prompt, response, temperature=TEMPERATURE)
            assert logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_a_late_replica_is_named(reference: ReferenceModel, run: RunCoroutine) -> None:
    hasty = ReferenceModel(reference._handle, deadline_s=0.001, application=reference.application)
    with pytest.raises(NoAnswer, match="the reference model did not answer"):
        run(hasty.logprobs([1, 2], [3, 4]))
