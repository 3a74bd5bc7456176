"""Replicas change to another reward model while they score: on real Serve, with real reward models."""

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray import serve

from actors.reward import NotLoaded, RewardHandle, Score, ScoreRequest, deploy_reward
from contracts.config import RewardConfig
from contracts.workers import ReplicaConfig
from models.latent import TypicalFeatures
from models.reward import RewardModel
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.tiny_reward import build_tiny_reward_model

ANSWERS = ["Read, listen and speak every day.", "I am sorry, this answer is not right.", "The wheel began to turn."]


@dataclass(frozen=True)
class Models:
    folders: list[Path]
    versions: list[str]
    scores: list[list[float]]  # of ANSWERS
    latents: list[list[float] | None]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("rewards")
    folders = [build_tiny_reward_model(root / str(seed), tiny_model, seed=seed) for seed in range(3)]
    features_NH = np.random.default_rng(0).normal(size=(30, 128))
    TypicalFeatures.fit(features_NH, np.arange(30)).save(folders[0])  # the others are from before there were any
    loaded = [RewardModel.load(str(folder), dtype="float32", max_tokens=64) for folder in folders]
    dialogues = [[*request.messages, {"role": "assistant", "content": request.response}] for request in requests()]
    found = [each.scores(dialogues) for each in loaded]
    versions = [each.version for each in loaded]
    return Models(folders, versions, [each.values for each in found], [each.latent for each in found])


def requests() -> list[ScoreRequest]:
    return [ScoreRequest([{"role": "user", "content": "What?"}], "What?", answer, {}) for answer in ANSWERS]


@pytest.fixture
def handle(ray_session: Processes, run: RunCoroutine, models: Models) -> Iterator[RewardHandle]:
    deploy = deploy_reward(
        RewardConfig(name="rm", model=str(models.folders[0])),
        ReplicaConfig(num_replicas=2, num_cpus=0.1, threads=1, max_batch_size=4, batch_wait_s=0.01),
        application="test-reward-load",
        model_path=str(models.folders[0]),
        dtype="float32",
        max_tokens=64,
        start_s=240,
    )
    yield run(deploy, timeout_s=300)
    serve.delete("test-reward-load")


async def score(handle: RewardHandle, rounds: int) -> list[Score]:
    return list(
        await asyncio.gather(*(handle.score(each, deadline_s=120) for _ in range(rounds) for each in requests()))
    )


def check(scores: list[Score], models: Models, allowed: set[int]) -> set[str]:
    """Each score and distance is that of the version that it names; the replicas that gave them."""
    by_version = dict(zip(models.versions, models.scores, strict=True))
    for at, each in enumerate(scores):
        assert each.version in {models.versions[number] for number in allowed}
        assert each.value == pytest.approx(by_version[each.version][at % len(ANSWERS)], abs=1e-3)
        latents = models.latents[models.versions.index(each.version)]
        assert each.latent == (None if latents is None else pytest.approx(latents[at % len(ANSWERS)], rel=1e-3))
    return {each.replica for each in scores}


def test_scores_go_on_and_each_names_its_version(handle: RewardHandle, run: RunCoroutine, models: Models) -> None:
    async def change() -> tuple[list[Score], tuple[str, str], list[Score]]:
        during: list[Score] = []
        loading = asyncio.ensure_future(handle.load(str(models.folders[1]), deadline_s=120))
        while not loading.done():
            during += await score(handle, 2)
        return during, loading.result(), await score(handle, 10)

    assert len(check(run(score(handle, 10)), models, {0})) == 2
    assert [latents is None for latents in models.latents] == [False, True, True]
    during, versions, after = run(change())
    assert versions == (models.versions[0], models.versions[1])
    check(during, models, {0, 1})
    assert models.versions[0] in {each.version for each in during}, "nothing waited for the new one"
    assert len(check(after, models, {1})) == 2

    # What cannot be loaded changes nothing, on any replica, and a later one is taken all the same.
    broken = models.folders[2].parent / "broken"
    shutil.copytree(models.folders[2], broken)
    (broken / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(NotLoaded, match=r"broken: .*its chat template is not the one that it was trained with"):
        run(handle.load(str(broken), deadline_s=120))
    assert len(check(run(score(handle, 10)), models, {1})) == 2
    assert run(handle.load(str(models.folders[2]), deadline_s=120)) == (models.versions[1], models.versions[2])
    check(run(score(handle, 10)), models, {2})


@pytest.mark.slow
def test_a_replica_that_starts_later_has_the_new_one(handle: RewardHandle, run: RunCoroutine, models: Models) -> None:
    run(handle.load(str(models.folders[1]), deadline_s=120))
    replicas = [each for each in psutil.process_iter() if "test-reward-load" in " ".join(each.cmdline()[:1])]
    assert len(replicas) == 2
    for each in replicas:
        os.kill(each.pid, signal.SIGKILL)
    check(run(score(handle, 10)), models, {1})


def test_a_function_has_no_reward_model(run: RunCoroutine) -> None:
    config = RewardConfig(name="f", function="tests.actors.judges:length")
    with pytest.raises(ValueError, match=r"reward component f is the function tests\.actors\.judges:length: no reward"):
        run(RewardHandle(config, None, "none").load("x", deadline_s=1))  # type: ignore[arg-type]
