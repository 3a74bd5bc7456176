"""Groups of learner ranks as Ray actors: two give what one gives, and a rank that dies or hangs costs no batch."""

import asyncio
import json
import os
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from cluster import experience_log
from contracts.algorithm import AlgorithmConfig, TrainingConfig
from contracts.config import DeadlinesConfig
from contracts.disk import DiskFull
from contracts.events import Event
from contracts.records import ScoredRollout
from contracts.workers import LearnerConfig
from learner.group import LearnerGroup, RankFailure
from learner.rank import LearnerSettings
from models.weight_stream import read_tensors
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.rollouts import scored_rollout
from tests.small_disk import MIB, SmallDisk, small_disk

STEPS = 3


def batch(step: int) -> list[ScoredRollout]:
    """Four prompts, two responses each, of many lengths."""
    source = random.Random(step)
    samples = []
    for group in range(4):
        prompt = [source.randrange(3, 300) for _ in range(source.randrange(2, 12))]
        for number in range(2):
            length = source.randrange(1, 14)
            samples.append(
                scored_rollout(
                    f"s{step}/g{group}/{number}",
                    group_id=f"s{step}/g{group}",
                    prompt=prompt,
                    response=[source.randrange(3, 300) for _ in range(length)],
                    behavior=[-5.8 + source.random() for _ in range(length)],
                    reference=[-5.8 + source.random() for _ in range(length)],
                    versions=[step - 1] * length,
                    reward=source.gauss(0, 1),
                    finish_reason=source.choice(["stop", "length"]),
                )
            )
    return samples


def settings(model: Path, **training: object) -> LearnerSettings:
    defaults: dict[str, object] = {
        "batch_size": 8,
        "samples_per_prompt": 2,
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_tokens": 40,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-3,
        "dtype": "float32",
    }
    return LearnerSettings(
        model_path=str(model),
        critic_path=None,
        algorithm=AlgorithmConfig(kl_target=1.0, normalise_values=True, normalise_rewards=True),
        training=TrainingConfig.model_validate(defaults | training),
        temperature=0.9,
        max_response_tokens=16,
        total_steps=10,
        seed=3,
    )


@asynccontextmanager
async def group(
    ranks: int, chosen: LearnerSettings, *, notes: list[Event] | None = None, rank_s: float = 60.0, **options: object
) -> AsyncIterator[LearnerGroup]:
    made = LearnerGroup(
        chosen,
        LearnerConfig(num_ranks=ranks, num_cpus=0.1, threads=1),
        DeadlinesConfig(rank_s=rank_s),
        on_change=(notes if notes is not None else []).append,
        **({"logged": batch} | options),  # type: ignore[arg-type]
    )
    await made.ready()
    try:
        yield made
    finally:
        made.stop()


def logged(run_dir: Path) -> Callable[[int], list[ScoredRollout]]:
    """The batches as a run's experience log gives them back."""
    (run_dir / "experience").mkdir()
    for step in range(1, STEPS + 1):
        experience_log.write(run_dir, step, batch(step), {})
    return lambda step: experience_log.batch(run_dir, step)


async def trained(made: LearnerGroup, first: int = 1, last: int = STEPS) -> list[dict[str, float]]:
    return [await made.step(batch(step), training_version=step - 1) for step in range(first, last + 1)]


async def weights(made: LearnerGroup, version: int) -> dict[str, torch.Tensor]:
    """As published, whole."""
    await made.publish(version)
    update, payload = await made.keyframe()
    return read_tensors(await asyncio.gather(*payload), update=update, sender="the learner")


async def run_of(ranks: int, chosen: LearnerSettings) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    async with group(ranks, chosen) as made:
        return await trained(made), await weights(made, STEPS)


def rank_processes(processes: Processes) -> list[psutil.Process]:
    return sorted(processes.alive("ray::LearnerRank"), key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def one_rank(ray_session: Processes, tiny_model: Path, run: RunCoroutine) -> tuple[list[dict[str, float]], dict]:
    return run(run_of(1, settings(tiny_model)))


@pytest.fixture(scope="module")
def two_ranks(ray_session: Processes, tiny_model: Path, run: RunCoroutine) -> tuple[list[dict[str, float]], dict]:
    return run(run_of(2, settings(tiny_model)))


def test_two_ranks_give_what_one_gives(one_rank, two_ranks) -> None:
    """Four optimizer steps a step with adaptive KL and running statistics: metrics in fp32, weights as published."""
    metrics, expected = one_rank
    more_metrics, found = two_ranks
    for step, (row, other) in enumerate(zip(metrics, more_metrics, strict=True), start=1):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (step, name)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # bf16 keeps 8 bits: a value may round to its neighbour
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1 / 128, atol=1e-4, msg=name)
    changed = sum(int((found[name] != tensor).sum()) for name, tensor in expected.items())
    assert changed < 0.01 * sum(tensor.numel() for tensor in expected.values())


@pytest.mark.slow
def test_a_checkpoint_of_one_rank_goes_on_on_two(one_rank, tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    metrics, _ = one_rank

    async def check() -> dict[str, float]:
        async with group(1, settings(tiny_model)) as made:
            await trained(made, last=STEPS - 1)
            await made.save(tmp_path)
        async with group(2, settings(tiny_model), snapshot=tmp_path / "state", step=STEPS - 1) as made:
            return (await trained(made, first=STEPS))[0]

    row = run(check())
    for name, value in metrics[-1].items():
        assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in saved.parameters())
    state = json.loads((tmp_path / "state" / "learner.json").read_text(encoding="utf-8"))
    assert (state["algorithm"], state["step_count"]) == ("ppo", STEPS - 1)
    assert state["kl_coef"] != settings(tiny_model).algorithm.kl_coef


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_lost_rank_is_named_and_no_batch_is_lost(
    two_ranks, tiny_model: Path, tmp_path: Path, run: RunCoroutine, end: signal.Signals
) -> None:
    """Killed or frozen in step 3, with a checkpoint of step 1: the same bits come out, from batches read back."""
    notes: list[Event] = []

    async def disturbed() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        async with group(2, settings(tiny_model), notes=notes, rank_s=4.0, logged=logged(tmp_path)) as made:
            metrics = await trained(made, last=1)
            await made.save(tmp_path)
            made.checkpointed(1, tmp_path / "state")
            metrics += await trained(made, first=2, last=2)
            lost = await made.pid(1)
            os.kill(lost, end)
            metrics += await trained(made, first=3)
            assert not psutil.pid_exists(lost) or psutil.Process(lost).status() == psutil.STATUS_ZOMBIE
            return metrics, await weights(made, STEPS)

    expected_metrics, expected = two_ranks
    metrics, found = run(disturbed())
    start, death, restart = notes
    assert start == Event("start", "the learner", "", "holds version 0", "127.0.0.1")
    assert (death.event, death.who, death.node) == ("death", "learner rank 1 of 2", "127.0.0.1")
    what = "died while asked to train step 3" if end == signal.SIGKILL else "has not answered for 4 s"
    assert death.cause.startswith(what)
    assert death.consequence == "the learner re-forms from step 1"
    assert restart == Event("restart", "the learner", "a rank was lost", "trained steps 2 to 2 again", "127.0.0.1")
    assert metrics == expected_metrics
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_rank_that_keeps_dying_ends_the_run_with_its_name(
    ray_session: Processes, tiny_model: Path, run: RunCoroutine
) -> None:
    notes: list[Event] = []

    async def check() -> None:
        async with group(2, settings(tiny_model), notes=notes) as made:
            dying = asyncio.create_task(kill_again_and_again(made))
            try:
                with pytest.raises(RankFailure, match=r"learner rank 1 of 2 on node 127\.0\.0\.1 died while asked to"):
                    await made.step(batch(1), training_version=0)
            finally:
                dying.cancel()

    run(check())
    assert [event.event for event in notes].count("death") == 3


async def kill_again_and_again(made: LearnerGroup) -> None:
    while True:
        try:
            os.kill(await made.pid(1), signal.SIGKILL)
        except (ray.exceptions.RayActorError, ProcessLookupError, IndexError):
            await asyncio.sleep(0.05)


def test_a_batch_that_cannot_be_trained_is_the_batchs_fault(
    ray_session: Processes, tiny_model: Path, run: RunCoroutine
) -> None:
    """Not taken for a failure of the ranks: no repair is tried."""
    notes: list[Event] = []

    async def check() -> None:
        async with group(2, settings(tiny_model), notes=notes) as made:
            bad = [*batch(1)[:-1], scored_rollout("bad one", group_id="x", reward=float("nan"))]
            with pytest.raises(ValueError, match="trajectory bad one: reward is not finite"):
                await made.step(bad, training_version=0)
            await made.step(batch(1), training_version=0)

    run(check())
    assert [event.event for event in notes] == ["start"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_no_failure_of_the_ranks(
    one_rank, two_ranks, tiny_model: Path, tmp_path: Path, run: RunCoroutine, ranks: int
) -> None:
    """No repair is tried, whichever part found no room; the ranks go on together, and write when there is room."""
    notes: list[Event] = []

    async def check(disk: SmallDisk) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        async with group(ranks, settings(tiny_model), notes=notes) as made:
            metrics = await trained(made, last=1)
            await made.save(tmp_path / "elsewhere")
            whole = sum(path.stat().st_size for path in (tmp_path / "elsewhere").rglob("*") if path.is_file())
            for share in (0.0, 0.1, 0.5, 0.95):  # in the policy, which rank 0 writes, and in the state of all
                disk.fill(leave_bytes=int(share * whole))
                with pytest.raises(DiskFull, match="the learner found no space left on its disk"):
                    await made.save(disk.folder / "checkpoint")
                shutil.rmtree(disk.folder / "checkpoint", ignore_errors=True)
                disk.empty()
            metrics += await trained(made, first=2)
            await made.save(disk.folder / "checkpoint")
            return metrics, await weights(made, STEPS)

    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        metrics, found = run(check(disk))
        assert AutoModelForCausalLM.from_pretrained(disk.folder / "checkpoint" / "policy").num_parameters() > 0
    assert [event.event for event in notes] == ["start"]
    expected_metrics, expected = one_rank if ranks == 1 else two_ranks
    assert metrics == expected_metrics
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Lossy:
    """`ray.put`, of which some objects are lost before anybody reads them: their owner is a process that dies."""

    def __init__(self, *lost: int) -> None:
        self._put, self._lost, self.count = ray.put, lost, 0

    def __call__(self, value: object) -> ray.ObjectRef:
        self.count += 1
        if self.count not in self._lost:
            return self._put(value)
        owner = Owner.options(num_cpus=0.1).remote()  # type: ignore[attr-defined]
        (ref,) = ray.get(owner.put.remote(value), timeout=60)
        process = psutil.Process(ray.get(owner.pid.remote(), timeout=60))
        ray.kill(owner)
        process.wait(20)
        for _ in range(200):
            try:
                ray.get(ref, timeout=60)
            except ray.exceptions.OwnerDiedError:
                return ref
            time.sleep(0.1)  # Ray has not noticed yet
        raise AssertionError("the object outlived its owner")


@ray.remote
class Owner:
    def put(self, value: object) -> list[ray.ObjectRef]:
        return [ray.put(value)]

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lost_batch_is_sent_again_and_trained_once(
    one_rank, two_ranks, tiny_model: Path, run: RunCoroutine, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    notes: list[Event] = []

    async def check() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        async with group(ranks, settings(tiny_model), notes=notes) as made:
            metrics = await trained(made, last=1)
            monkeypatch.setattr(ray, "put", Lossy(1, 2))
            metrics += await trained(made, first=2)
            return metrics, await weights(made, STEPS)

    expected_metrics, expected = one_rank if ranks == 1 else two_ranks
    metrics, found = run(check())
    assert [(event.event, event.who) for event in notes[1:]] == [("lost", "the batch to train step 2 on")] * 2
    assert "The object's owner has exited" in notes[1].cause
    assert notes[1].consequence == "no rank had it: it is sent again"
    assert metrics == expected_metrics
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_batch_that_one_rank_has_and_another_lost_is_trained_once(
    two_ranks, tiny_model: Path, run: RunCoroutine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is in the middle of the step when rank 1 cannot begin it: both are replaced."""
    notes: list[Event] = []

    async def check() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        async with group(2, settings(tiny_model), notes=notes) as made:
            metrics = await trained(made, last=1)
            other, lose = made._ranks[1], Lossy(1)
            step = other.step
            copies = SimpleNamespace(remote=lambda ref, version: step.remote(lose(ray.get(ref, timeout=60)), version))
            other.step = copies
            metrics += await trained(made, first=2)
            return metrics, await weights(made, STEPS)

    expected_metrics, expected = two_ranks
    metrics, found = run(check())
    lost, restart = notes[1:]
    assert (lost.event, lost.who) == ("lost", "learner rank 1 of 2")
    assert lost.cause.startswith("did not get what it was asked to train step 2 on: ")
    assert lost.consequence == "the learner re-forms from step 0"
    assert restart.event == "restart"
    assert metrics == expected_metrics
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(autouse=True)
def _nothing_left(ray_session: Processes) -> Iterator[None]:
    yield
    assert psutil.wait_procs(rank_processes(ray_session), timeout=20)[1] == []
