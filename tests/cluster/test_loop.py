"""The closed loop on the tiny model: rounds that ask, learn a reward and train on it, with a panel and with people."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster import train
from cluster.loop import read
from contracts.config import ConfigError
from contracts.loading import validate
from contracts.loop import LoopConfig
from contracts.stopping import StopRequest
from feedback.store import Judgment, Store
from learner.experience_queue import ExperienceQueue, StalenessBound
from tests.cluster.test_train import write_config, write_project
from tests.command import Command, rows

PANEL = {
    "gold": "judges_of_test:brevity",
    "pairs": 12,
    "votes_per_pair": 1,
    "voters": {"all": {"count": 2, "accuracy": 1}},
}


def looped(model: Path, folder: Path, **preferences: Any) -> dict[str, Any]:
    return write_project(folder, model) | {
        "steps": 6,
        "loop": {"rounds": 3},
        "streaming": {"max_lag_steps": 1},
        "preferences": {"reward_model": {"batch_size": 4, "max_tokens": 128, "held_out_fraction": 0.3}, **preferences},
        "rewards": [{"name": "friendly", "model": "preferences"}],
        "evaluation": {"judges": [{"name": "short", "function": "judges_of_test:brevity"}]},
    }


@pytest.fixture(autouse=True)
def _ray_folder(short_folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(short_folder))
        yield


@pytest.mark.parametrize(("rounds", "steps", "begins"), [(3, 6, [0, 2, 4]), (3, 20, [0, 6, 13]), (1, 5, [0])])
def test_rounds_share_the_steps(rounds: int, steps: int, begins: list[int]) -> None:
    config = LoopConfig(rounds=rounds)
    assert [config.begins(number, steps) for number in range(1, rounds + 1)] == begins


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preferences": None, "rewards": [{"name": "a", "function": "a:b"}]}, "preferences.simulate or"),
        ({"preferences": {"path": "pairs.jsonl"}}, "asks anew in every round"),
        ({"rewards": [{"name": "a", "function": "a:b"}]}, "no reward has model `preferences`"),
        ({"steps": 2}, "3 rounds need as many steps"),
        ({"deterministic": True, "streaming": {"max_lag_steps": 0}}, "leave deterministic out"),
        ({"preferences": {"simulate": PANEL, "people": {"store": "votes.sqlite"}}}, "exactly one of"),
    ],
)
def test_what_cannot_loop_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = looped(tmp_path / "model", tmp_path, simulate=PANEL) | change
    with pytest.raises(ConfigError, match=message):
        validate(config, source="config.yaml")


@pytest.mark.slow
def test_each_round_asks_learns_and_trains(tiny_model: Path, tmp_path: Path) -> None:
    config = looped(tiny_model, tmp_path, simulate=PANEL)
    config["streaming"]["max_lag_steps"] = 0
    config["rollout"]["max_concurrent"] = 16  # fewer places than an evaluation asks for
    write_config(tmp_path, config)
    with Command("loop", "config.yaml", cwd=tmp_path) as command:
        assert command.status() == 0, command.output
        assert command.processes.wait_gone() == []
    run_dir = tmp_path / "run"
    rounds = read(run_dir)
    assert [(each["round"], each["began_at_step"], each["ended_at_step"]) for each in rounds] == [
        (1, 0, 2),
        (2, 2, 4),
        (3, 4, 6),
    ]
    votes = [each["votes"] for each in rounds]
    assert votes[0] < votes[1] < votes[2] <= 36
    versions = [each["reward_model"]["reward_version"] for each in rounds]
    assert len(set(versions)) == 3
    rolled_out = [event for event in rows(run_dir / "events.jsonl") if event["event"] == "reward_rollout"]
    assert [version in event["cause"] for version, event in zip(versions[1:], rolled_out, strict=True)] == [True] * 2
    scored_by = [
        set(pq.read_table(run_dir / f"experience/step-{step:06d}.parquet")["reward_version"].to_pylist())
        for step in range(1, 7)
    ]
    assert scored_by[0] == {versions[0]}
    assert (scored_by[2], scored_by[4]) == ({versions[1]}, {versions[2]})  # what waited was scored again
    assert "win_rate" not in rounds[0]
    for later in rounds[1:]:
        assert later["win_rate"]["judged_by"] == "gold/short"
        assert 0 <= later["win_rate"]["mean"] <= 1
    report = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Rounds of the loop" in report
    assert versions[2] in report


@pytest.mark.slow
def test_people_are_waited_for_until_their_time_is_over(tiny_model: Path, tmp_path: Path) -> None:
    people = {"store": "votes.sqlite", "pairs": 12, "votes_per_pair": 1, "wait_s": 45, "min_comparisons": 6}
    write_config(tmp_path, looped(tiny_model, tmp_path, people=people) | {"steps": 2, "loop": {"rounds": 2}})
    over = threading.Event()
    voting = threading.Thread(target=vote_on_the_first_round, args=(tmp_path / "votes.sqlite", over))
    voting.start()
    try:
        with Command("loop", "config.yaml", cwd=tmp_path) as command:
            assert command.status() == 0, command.output
            assert command.processes.wait_gone() == []
    finally:
        over.set()
        voting.join(30)
    first, second = read(tmp_path / "run")
    assert first["votes"] > 6
    assert second["votes"] == first["votes"], "nobody voted in the second round"
    assert second["ended_at_step"] == 2
    with Store(tmp_path / "votes.sqlite") as store:
        assert store.ballots("pair").voters == ["anna"]


def vote_on_the_first_round(place: Path, over: threading.Event) -> None:
    """A person who prefers what is shown on the left, and goes home after the first round."""
    while not place.exists() and not over.is_set():
        time.sleep(0.2)
    with Store(place) as store:
        anna, _ = store.register("anna")
        voted = 0
        while not over.is_set():
            given = store.next_task(anna, kinds=("pair",))
            if given is None:
                if voted:
                    return
                time.sleep(0.5)
                continue
            voted += 1
            store.submit(anna, given.task_id, Judgment(f"vote-{voted}", choice="a"), lease_id=given.lease_id)


def test_a_place_that_nobody_tells_of_is_offered_while_the_learner_waits() -> None:
    """The second round of a run without asynchrony hung: an evaluation had taken all places, and told nobody after."""

    class Waits:
        offered = 0
        stopping = StopRequest()
        queue = ExperienceQueue(StalenessBound(0, 1), max_samples=4, max_bytes=1 << 20)
        leases = SimpleNamespace(running=dict)
        version = 0
        bound = SimpleNamespace(groups_per_batch=1)
        progress = SimpleNamespace(waiting=lambda text: None)

        async def offer_places(self) -> None:
            self.offered += 1
            self.stopping.set()

    job = Waits()

    async def wait() -> None:
        async with asyncio.timeout(5):
            assert await train.next_batch(job) is None  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_LOOK_AGAIN_S", 0.01)
        asyncio.run(wait())
    assert job.offered == 1
