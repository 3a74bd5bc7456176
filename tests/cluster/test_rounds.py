"""Rounds of a deterministic run, without Ray: whatever takes how long, the same groups, batches and state.

Engines and replicas are stood in for by functions whose answer depends on everything that came in the same call, as
the last bits of real ones do.
"""

import asyncio
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.admission import BadRollout
from actors.prompts import PromptStream
from actors.reward import BadSample
from actors.rollout import RolloutRequest
from cluster import recover, train
from cluster.job import Job
from cluster.leases import LeaseBook
from cluster.resume import Resumption, restore
from cluster.run_log import RunLog
from cluster.together import batches, shares
from contracts.config import Config
from contracts.loading import validate
from contracts.records import Prompt, Rollout
from contracts.stopping import StopRequest
from learner.experience_queue import ExperienceQueue, StalenessBound
from tests.command import rows

STEPS = 12
PROMPTS = [Prompt(f"p{i}", [1, 2, i], f"{i}?", []) for i in range(20)]


def drawn(*what: object) -> int:
    return zlib.crc32(repr(what).encode())


class Workers:
    """Engines, reward replicas and reference replicas that take a random time. `calls` are what they were asked."""

    busy = None

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self.version = 0
        self.calls: list[tuple[Any, ...]] = []

    async def generate_together(
        self, index: int, requests: Sequence[RolloutRequest], *, deadline_s: float
    ) -> list[Rollout | BadRollout]:
        await self._work()
        ids = [request.trajectory_id for request in requests]
        self.calls.append(("generate", index, self.version, *ids))
        return [self._response(index, number, requests) for number in range(len(requests))]

    def _response(self, index: int, number: int, requests: Sequence[RolloutRequest]) -> Rollout | BadRollout:
        request = requests[number]
        if drawn("bad", request.trajectory_id) % 17 == 0:
            return BadRollout(f"rollout-{index}: no response to {request.trajectory_id}")
        bits = drawn(index, self.version, number, [(each.trajectory_id, each.seed) for each in requests])
        return Rollout(
            request.trajectory_id,
            request.prompt_id,
            request.group_id,
            request.prompt_tokens,
            [3, 4],
            f"response {bits}",
            [-1.0, -bits / 2**33],
            [self.version] * 2,
            "stop",
            f"rollout-{index}",
        )

    async def score_together(self, asked: Sequence[tuple[Prompt, str]]) -> list[Any]:
        await self._work()
        self.calls.append(("score", *(response for _, response in asked)))
        scores = [drawn(number, asked) % 3 for number in range(len(asked))]
        return [
            BadSample("bad") if drawn(response) % 13 == 0 else (float(score), {"toy": float(score)}, "1")
            for score, (_, response) in zip(scores, asked, strict=True)
        ]

    async def logprobs_together(self, responses: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        await self._work()
        return [[-1.0 / (1 + number), -1.0 / len(responses)] for number in range(len(responses))]

    async def save(self, folder: Path) -> None:
        """Of the learner: nothing to keep."""

    def checkpointed(self, step: int, state: Path) -> None: ...

    async def _work(self) -> None:
        for _ in range(self._draw.randrange(20)):
            await asyncio.sleep(0)


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def configuration(folder: Path, **settings: Any) -> Config:
    data: dict[str, Any] = {
        "output_dir": str(folder),
        "deterministic": True,
        "steps": STEPS,
        "model": {"path": "none", "max_context_tokens": 64},
        "prompts": {"path": "none.jsonl"},
        "rewards": [{"name": "toy", "function": "none:none"}],
        "sampling": {"max_response_tokens": 8},
        "rollout": {"num_workers": 3},
        "reward_workers": {"max_batch_size": 5},
        "reference_workers": {"max_batch_size": 7},
        "algorithm": {"name": "grpo", "drop_equal_groups": True},
        "training": {"batch_size": 16, "samples_per_prompt": 2, "micro_batch_tokens": 64},
        "streaming": {"max_bad_fraction": 1.0},
    }
    return validate(data | settings, source="test")


class Run:
    """A run without a learner: batches are taken as they come, and the state is written down with each."""

    def __init__(self, folder: Path, timing: int, *, state: dict[str, Any] | None = None) -> None:
        self.workers = Workers(random.Random(timing))
        bound = StalenessBound(0, 8)
        step = state["step"] if state else 0
        parts: Any = self.workers
        quarantined = state["leases"]["counts"]["quarantined"] if state else None
        self.log = RunLog(folder, resume_step=step if state else None, quarantined=quarantined)
        self.job = Job(
            config=configuration(folder),
            run_id="test",
            prompts=PromptStream(PROMPTS, seed=0),
            eval_prompts=[],
            pool=parts,
            learner=parts,
            rewards=parts,
            judges=parts,
            reference=parts,
            queue=ExperienceQueue(bound, max_samples=16, max_bytes=1 << 30),
            leases=LeaseBook(bound, 2),
            log=self.log,
            progress=Silent(),  # type: ignore[arg-type]
            stopping=StopRequest(),
            version=step,
            choosing=step,
        )
        self.workers.version = step
        if state is not None:
            restore(self.job, Resumption(None, step, step, state), PROMPTS)
        self.job.standing = recover.standing(self.job, step)
        self.seen: list[Any] = []

    async def train(self, *, until: int = STEPS) -> None:
        collecting = asyncio.ensure_future(train.collect(self.job))
        while self.job.version < until:
            batch = await train.next_batch(self.job)
            assert batch is not None
            self.job.leases.trained(batch)
            self.job.bad_reasons.clear()
            self.job.dropped_in_a_row = 0
            self.job.standing = recover.standing(self.job, self.job.version + 1)
            samples = [sample for group in batch for sample in group.samples]
            self.seen.append((samples, json.loads(json.dumps(self.job.standing))))
            self.job.version += 1
            self.workers.version = self.job.choosing = self.job.version
            await self.job.notify()
        for _ in range(30):  # a round is on its way
            await asyncio.sleep(0)
        collecting.cancel()


@pytest.fixture
def quiet(tmp_path: Path) -> Run:
    run = Run(tmp_path / "quiet", 0)
    asyncio.run(run.train())
    return run


def test_timing_decides_nothing(quiet: Run, tmp_path: Path) -> None:
    counts = quiet.job.leases.counts
    assert min(counts.quarantined, counts.dropped, counts.trained) > 5  # rounds that fill up rounds are in it
    assert (counts.expired, counts.open) == (0, 0)
    for timing in (1, 2, 3):
        run = Run(tmp_path / str(timing), timing)
        asyncio.run(run.train())
        assert run.seen == quiet.seen
        assert sorted(run.workers.calls) == sorted(quiet.workers.calls)
        assert rows(tmp_path / str(timing) / "quarantine.jsonl") == rows(tmp_path / "quiet" / "quarantine.jsonl")


@pytest.mark.parametrize("step", [1, 5, STEPS - 1])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(quiet: Run, tmp_path: Path, step: int) -> None:
    """Killed while a round is on its way: what it had begun is done again under the same ids."""
    folder = tmp_path / "killed"
    killed = Run(folder, 4)
    asyncio.run(killed.train(until=step))
    assert killed.job.leases.counts.open > 0
    resumed = Run(folder, 5, state=killed.seen[-1][1])
    asyncio.run(resumed.train())
    assert killed.seen + resumed.seen == quiet.seen
    assert rows(folder / "quarantine.jsonl") == rows(tmp_path / "quiet" / "quarantine.jsonl")


def test_a_checkpoint_in_the_middle_of_a_round_holds_the_state_between_batches(quiet: Run, tmp_path: Path) -> None:
    """As SIGTERM writes one."""
    run = Run(tmp_path / "stopped", 6)

    async def stop_in_a_round() -> None:
        await run.train(until=5)
        assert run.job.leases.counts.open > 0
        await recover.checkpoint(run.job)

    asyncio.run(stop_in_a_round())
    saved = run.job.last_checkpoint
    assert saved is not None
    state = json.loads((saved.state / "run.json").read_text(encoding="utf-8"))
    samples, standing = quiet.seen[4]
    assert samples == run.seen[4][0]
    assert state == {name: standing[name] for name in state if name != "queued"} | {"queued": {}}


def test_groups_go_to_workers_by_their_number_and_responses_to_replicas_in_batches_of_one_size(quiet: Run) -> None:
    first = [call for call in quiet.workers.calls if call[0] == "generate"][:3]
    assert [call[2:6] for call in sorted(first)] == [
        (0, f"g{worker:08d}-0", f"g{worker:08d}-1", f"g{worker + 3:08d}-0") for worker in range(3)
    ]
    assert max(len(call) - 1 for call in quiet.workers.calls if call[0] == "score") == 5
    assert shares("abcdefg", 3) == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert [list(batch) for batch in batches("abcdefg", 3)] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
