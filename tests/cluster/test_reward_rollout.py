"""Another reward model for a running run: asked for through its folder, answered there, told in its events."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from actors.reward import NotLoaded
from cluster import reward_rollout
from cluster.reward_rollout import ask, newest, roll_out
from contracts.config import Config, ConfigError
from contracts.events import Event
from contracts.loading import dump, validate
from contracts.waiting import NoAnswer
from tests.cluster.test_train import write_config, write_project
from tests.command import Command, rows
from tests.tiny_reward import build_tiny_reward_model


class Replicas:
    """A reward component whose replicas have taken everything but what is called bad."""

    def __init__(self, name: str) -> None:
        self.config = SimpleNamespace(name=name)
        self.who = f"reward component {name}"
        self.version = "v0"

    async def load(self, path: str, *, deadline_s: float) -> tuple[str, str]:
        if "bad" in path:
            raise NotLoaded(f"{path}: no")
        before, self.version = self.version, Path(path).name
        return before, self.version


@pytest.fixture(scope="module")
def reward_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_reward_model(tmp_path_factory.mktemp("rewards") / "new", tiny_model, seed=1)


def config(folder: Path, **changes: Any) -> Config:
    data = {
        "output_dir": str(folder),
        "model": {"path": "m"},
        "prompts": {"path": "p"},
        "rewards": [{"name": "rm", "model": "x"}, {"name": "f", "function": "a:b"}],
        **changes,
    }
    return validate(data, source="test")


def job(folder: Path, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    settings = config(folder, **changes)
    (folder / "config.yaml").write_text(dump(settings), encoding="utf-8")
    events: list[Event] = []
    return SimpleNamespace(
        config=settings,
        version=7,
        rewards=SimpleNamespace(handles=(Replicas("rm"),)),
        judges=SimpleNamespace(handles=()),
        events=events,
        log=SimpleNamespace(event=events.append),
        progress=SimpleNamespace(note=print, warn=print),
    )


def test_a_rollout_is_an_event_with_both_versions_and_outlives_the_process(tmp_path: Path) -> None:
    running = job(tmp_path)
    (tmp_path / "v1").mkdir()
    done = asyncio.run(roll_out(running, "rm", tmp_path / "v1"))
    assert (done.version_before, done.version, done.step) == ("v0", "v1", 7)
    event = running.events[0]
    assert (event.event, event.who) == ("reward_rollout", "reward component rm")
    assert "reward_version v1" in event.cause
    assert "it had v0" in event.consequence
    assert newest(tmp_path) == {"rm": tmp_path / "v1"}
    (tmp_path / "v1").rmdir()
    with pytest.raises(ConfigError, match=r"reward component rm scored with .*v1, which is gone"):
        newest(tmp_path)


def test_a_refused_one_changes_nothing_and_is_told(tmp_path: Path) -> None:
    running = job(tmp_path)
    with pytest.raises(NotLoaded):
        asyncio.run(roll_out(running, "rm", tmp_path / "bad"))
    assert [event.event for event in running.events] == ["refusal"]
    assert newest(tmp_path) == {}
    with pytest.raises(ValueError, match="no reward component other; there are: rm"):
        asyncio.run(roll_out(running, "other", tmp_path))


@contextmanager
def watching(running: Any) -> Iterator[None]:
    """The run's side, in a thread of its own."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(reward_rollout.watch(running))
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.gather(task, return_exceptions=True)))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()


def test_a_person_asks_a_running_run(tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_rollout, "_LOOK_AGAIN_S", 0.02)
    running = job(tmp_path / "run")
    bad = tmp_path / "bad"
    bad.symlink_to(reward_folder)
    with watching(running):
        assert ask(tmp_path / "run", None, reward_folder, wait_s=20) == "rm: reward_version v0 -> new"
        monkeypatch.setattr(running.rewards.handles[0], "load", refuse)
        (tmp_path / "run" / reward_rollout.ASKED).write_text("nonsense")
        while (tmp_path / "run" / reward_rollout.ASKED).exists():
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="the run refused it: the replicas said no"):
            ask(tmp_path / "run", "rm", reward_folder, wait_s=20)
    assert newest(tmp_path / "run") == {"rm": reward_folder.resolve()}
    assert not (tmp_path / "run" / reward_rollout.ASKED).exists()


async def refuse(path: str, *, deadline_s: float) -> tuple[str, str]:
    raise NotLoaded("the replicas said no")


def test_a_deterministic_run_refuses(tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_rollout, "_LOOK_AGAIN_S", 0.02)
    running = job(tmp_path / "run", deterministic=True)
    with watching(running), pytest.raises(ConfigError, match="refused it: the run is deterministic"):
        ask(tmp_path / "run", "rm", reward_folder, wait_s=20)
    assert running.rewards.handles[0].version == "v0"


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, reward_folder: Path) -> None:
    job(tmp_path)
    with pytest.raises(ConfigError, match="--component f: reward models of this run are: rm"):
        ask(tmp_path, "f", reward_folder, wait_s=1)
    with pytest.raises(ConfigError, match=r"is no reward model of Headrace: reward_card\.json is missing"):
        ask(tmp_path, "rm", tmp_path, wait_s=1)
    with pytest.raises(ConfigError, match=r"none/config\.yaml: cannot be read"):
        ask(tmp_path / "none", "rm", reward_folder, wait_s=1)
    with pytest.raises(NoAnswer, match="no run works in"):
        ask(tmp_path, "rm", reward_folder, wait_s=0.1)
    assert not (tmp_path / reward_rollout.ASKED).exists(), "withdrawn"


@pytest.mark.slow
def test_a_run_takes_another_reward_model_without_stopping(tiny_model: Path, tmp_path: Path) -> None:
    """Both versions are in the experience log, the event and the report; a resumed run starts with the second."""
    folders = [build_tiny_reward_model(tmp_path / f"rm{seed}", tiny_model, seed=seed) for seed in range(2)]
    settings = write_project(tmp_path, tiny_model)
    settings |= {"rewards": [{"name": "rm", "model": str(folders[0])}], "steps": 40}
    write_config(tmp_path, settings)
    run = tmp_path / "run"
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: len(rows(run / "metrics.jsonl")) >= 3, "3 steps")
        with Command("reward-rollout", "run", str(folders[1]), cwd=tmp_path) as asking:
            assert asking.status() == 0, asking.output
            assert "rm: reward_version " in asking.output
        at = len(rows(run / "metrics.jsonl"))
        command.until(lambda: len(rows(run / "metrics.jsonl")) >= at + 4, "4 more steps")
        command.ctrl_c()
        assert command.status() == 130, command.output
    before, after = (json.loads(line) for line in (run / reward_rollout.DONE).read_text().splitlines()[:1] * 2)
    old, new = before["version_before"], after["version"]
    assert old != new
    versions = [
        row["reward_version"]
        for file in sorted((run / "experience").glob("*.parquet"))
        for row in pq.read_table(file, columns=["reward_version"]).to_pylist()
    ]
    assert set(versions) == {old, new}
    assert versions[0] == old
    assert versions[-1] == new
    steps = yaml.safe_load((run / "config.yaml").read_text())["steps"]
    assert steps == 40
    with Command(
        "train", "config.yaml", "resume=true", f"steps={len(rows(run / 'metrics.jsonl')) + 2}", cwd=tmp_path
    ) as command:
        assert command.status() == 0, command.output
    last = sorted((run / "experience").glob("*.parquet"))[-1]
    assert {row["reward_version"] for row in pq.read_table(last, columns=["reward_version"]).to_pylist()} == {new}
    report = (run / "report.html").read_text()
    assert "reward rollout" in report
    assert f"reward_version {new}" in report
