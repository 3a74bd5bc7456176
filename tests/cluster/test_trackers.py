"""Curves reach TensorBoard, Weights & Biases and Prometheus, and no tracker can hold a run up or end it."""

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.roster import WorkerCounts
from cluster.leases import LeaseBook
from cluster.prepare import tracker_lost
from cluster.progress import Progress
from cluster.run_log import RunLog
from cluster.trackers import Trackers, start_trackers
from cluster.trackers.ray_metrics import COUNTERS, GAUGES, RayMetrics, watch
from cluster.trackers.tensorboard import TensorBoard
from cluster.trackers.weights_and_biases import check_wandb
from contracts.config import Config, ConfigError, WandbConfig
from contracts.events import Event
from contracts.loading import validate
from learner.experience_queue import ExperienceQueue, ScoredGroup, StalenessBound
from tests.command import Processes
from tests.curves import ROOT, documented_curves, offline_runs
from tests.rollouts import scored_rollout


def row(step: int, **curves: float) -> dict[str, Any]:
    """A row of metrics.jsonl with what every row has."""
    counts = {"samples": 32, "broadcast_bytes": 1000, "broadcast_keyframe_bytes": 0}
    return {"step": step, "time": time.time(), "reward_mean": step / 2, "weights_digest": "ab", **counts, **curves}


def configuration(run_dir: Path, **logging: Any) -> Config:
    data = {
        "output_dir": str(run_dir),
        "model": {"path": "some/model"},
        "prompts": {"path": "prompts.jsonl"},
        "rewards": [{"name": "length", "function": "my.rewards:length"}],
        "logging": {"tensorboard": False, **logging},
    }
    return validate(data, source="tests")


def log_run(config: Config, steps: range, *, last_row: int | None = None) -> tuple[list[tuple[str, str]], list[str]]:
    """The trackers of a run that does these steps: those lost, and what was told."""
    config.output_dir.mkdir(exist_ok=True)
    lost: list[tuple[str, str]] = []
    told: list[str] = []
    trackers = start_trackers(config, last_row=last_row, on_lost=lambda *why: lost.append(why), tell=told.append)
    for step in steps:
        trackers.write(row(step))
    asyncio.run(trackers.close())
    return lost, told


# TensorBoard


def test_tensorboard_shows_every_number_and_a_resumed_run_once(tmp_path: Path) -> None:
    config = configuration(tmp_path, tensorboard=True)
    log_run(config, range(1, 6))
    log_run(config, range(4, 7), last_row=3)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in shown.Scalars("reward_mean")] == [(n, n / 2) for n in range(1, 7)]
    assert set(shown.Tags()["scalars"]) == {"reward_mean", "samples", "broadcast_bytes", "broadcast_keyframe_bytes"}


# Weights & Biases, the real package, offline


def test_an_offline_run_is_read_back_and_resumed_as_the_same(tmp_path: Path) -> None:
    wandb = {"project": "p", "group": "g", "tags": ["a", "b"], "mode": "offline"}
    config = configuration(tmp_path / "my-run", wandb=wandb)
    lost, told = log_run(config, range(1, 4))
    assert lost == []
    assert told == [f"Weights & Biases: offline; later: wandb sync {next((tmp_path / 'my-run/wandb').glob('off*'))}"]
    assert log_run(config, range(4, 6), last_row=3)[0] == []
    (run, rows, status), (again, more, _) = offline_runs(tmp_path / "my-run")
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("p", "my-run", "g", ["a", "b"])
    settings = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert settings["training"]["batch_size"] == config.training.batch_size
    assert status == 0
    assert again.run_id == run.run_id == json.loads((tmp_path / "my-run/wandb.json").read_text())["id"]
    assert list(rows | more) == [1, 2, 3, 4, 5]
    assert [(each["step"], each["reward_mean"]) for each in (rows | more).values()] == [(n, n / 2) for n in range(1, 6)]
    assert "weights_digest" not in rows[1]


def test_a_fresh_run_or_another_project_is_another_run(tmp_path: Path) -> None:
    def id_of(project: str, last_row: int | None) -> str:
        config = configuration(tmp_path, wandb={"project": project, "mode": "offline"})
        log_run(config, range(0), last_row=last_row)
        return str(json.loads((tmp_path / "wandb.json").read_text())["id"])

    first = id_of("p", None)
    assert id_of("p", 3) == first
    other = id_of("q", 3)
    assert len({first, other, id_of("q", None)}) == 3


LOGGING_RUN = """
    import asyncio, json, sys, time
    import psutil
    from cluster.trackers import start_trackers
    from cluster.trackers.weights_and_biases import check_wandb
    from contracts.loading import validate

    config = validate(json.loads(sys.argv[2]), source="tests")
    check_wandb(config.logging.wandb)
    config.output_dir.mkdir()
    lost, told = [], []
    trackers = start_trackers(config, last_row=None, on_lost=lambda *why: lost.append(why), tell=told.append)
    longest = 0.0
    opened = time.monotonic() + 60
    while sys.argv[1] == "kill" and not told and time.monotonic() < opened:
        time.sleep(0.05)
    step = 0
    while step < 8 or (sys.argv[1] == "kill" and not lost and step < 100):
        step += 1
        begun = time.monotonic()
        trackers.write({"step": step, "reward_mean": step / 2})
        longest = max(longest, time.monotonic() - begun)
        time.sleep(0.3)
        if step == 4 and sys.argv[1] == "kill":
            for process in psutil.Process().children():
                if process.name() == "wandb-core":
                    process.kill()
                    process.wait(30)
    begun = time.monotonic()
    asyncio.run(trackers.close())
    print(json.dumps({"lost": lost, "longest_s": longest, "close_s": time.monotonic() - begun}))
"""


def in_a_process(folder: Path, what: str, mode: str, **environment: str) -> dict[str, Any]:
    """A run in a process of its own: W&B keeps logins and its service for as long as a process lives."""
    config = configuration(folder / "run", wandb={"mode": mode}, deadline_s=5)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOGGING_RUN), what, config.model_dump_json()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_SERVICE": ""} | environment,  # not that of this process
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_costs_the_run_nothing_but_the_curves(tmp_path: Path) -> None:
    result = in_a_process(tmp_path, "", "online", WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    ((name, cause),) = result["lost"]
    assert name == "Weights & Biases"
    assert cause.startswith(("CommError: ", "it has not answered"))
    assert result["longest_s"] < 1  # it is microseconds where the machine has nothing else to do
    assert result["close_s"] < 20


def test_a_service_that_dies_in_the_middle_is_told_once(tmp_path: Path) -> None:
    result = in_a_process(tmp_path, "kill", "offline")
    ((name, cause),) = result["lost"]
    assert name == "Weights & Biases"
    assert "Error: " in cause
    assert result["longest_s"] < 1


def test_who_is_not_logged_in_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"logging\.wandb: nobody is logged in: call `wandb login`, .*mode=offline$"):
        check_wandb(WandbConfig())
    check_wandb(WandbConfig(mode="offline"))
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ConfigError, match=r"^logging\.wandb: WANDB_API_KEY invalid: [^\n]*$"):
        check_wandb(WandbConfig())
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match=r"mode is online, but WANDB_MODE is offline"):
        check_wandb(WandbConfig())


def test_a_missing_package_is_named_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name == "wandb" or name.startswith("wandb.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[wandb\]'"):
        check_wandb(WandbConfig(mode="offline"))


# Trackers that fail


class Difficult:
    """A tracker that raises or hangs at one step, and keeps what it was given."""

    def __init__(self, name: str, *, raises_at: int = 0, hangs_at: int = 0) -> None:
        self.name = name
        self.raises_at, self.hangs_at = raises_at, hangs_at
        self.steps: list[int] = []
        self.free = threading.Event()
        self.closed: bool | None = None

    def open(self) -> str:
        return ""

    def write(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.raises_at:
            raise ConnectionError("the line is dead\nand more")
        if row["step"] == self.hangs_at:
            self.free.wait(60)
        self.steps.append(row["step"])

    def close(self, *, failed: bool) -> None:
        self.closed = failed


def test_trackers_that_fail_or_hang_are_told_once_and_the_others_go_on() -> None:
    sound, raising = Difficult("sound"), Difficult("raising", raises_at=2)
    hanging = Difficult("hanging", hangs_at=3)
    lost: list[tuple[str, str]] = []
    trackers = Trackers([sound, raising, hanging], deadline_s=0.5, on_lost=lambda *why: lost.append(why))
    begun = time.monotonic()
    for step in range(1, 6):
        trackers.write(row(step))
    assert time.monotonic() - begun < 0.4
    time.sleep(0.8)
    trackers.write(row(6))
    trackers.write(row(7))
    (first, cause), (second, why) = lost
    assert (first, cause) == ("raising", "ConnectionError: the line is dead and more")
    assert second == "hanging"
    assert why.startswith("it has not answered for ")
    asyncio.run(trackers.close(failed=True))
    assert len(lost) == 2
    assert sound.steps == [1, 2, 3, 4, 5, 6, 7]
    assert (sound.closed, raising.closed, hanging.closed) == (True, None, None)
    assert (raising.steps, hanging.steps) == ([1], [1, 2])
    hanging.free.set()


def test_the_end_waits_no_longer_than_the_deadline() -> None:
    hanging = Difficult("hanging", hangs_at=1)
    lost: list[tuple[str, str]] = []
    trackers = Trackers([hanging], deadline_s=0.3, on_lost=lambda *why: lost.append(why))
    trackers.write(row(1))

    async def close() -> float:
        ticks, closing = 0, asyncio.ensure_future(trackers.close())
        while not closing.done():
            ticks += 1
            await asyncio.sleep(0.02)
        assert ticks > 3  # the loop went on
        return time.monotonic()

    begun = time.monotonic()
    assert 0.25 < asyncio.run(close()) - begun < 5
    assert [name for name, _ in lost] == ["hanging"]
    hanging.free.set()


def test_a_lost_tracker_is_shown_and_kept_as_an_event(tmp_path: Path) -> None:
    log, console = RunLog(tmp_path, resume_step=None), Console(file=(tmp_path / "out").open("w"), width=200)
    board = TensorBoard(tmp_path / "file", purge_step=None)
    (tmp_path / "file").touch()  # where its folder should be
    with Progress(1, console=console) as progress:
        trackers = Trackers([board], deadline_s=20, on_lost=lambda *why: tracker_lost(log, progress, *why))
        log.on_row = trackers.write
        log.metrics(row(1))
        asyncio.run(trackers.close())
    log.close()
    console.file.close()
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["who"]) == ("untracked", "TensorBoard")
    assert event["cause"].startswith("FileExistsError: ")
    assert "warning: TensorBoard is not written to any more: FileExistsError" in (tmp_path / "out").read_text()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


# Ray metrics


def endpoint() -> dict[str, float]:
    """What Prometheus would read of Headrace on this node: `name{our tags}` to the value."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^(ray_headrace_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        ours = re.findall(r'\b((?:run_id|run|state|component|event|kind)="[^"]*")', tags)
        found[f"{name}{{{','.join(sorted(ours))}}}"] = float(value)
    return found


def test_prometheus_reads_what_the_run_sets(ray_session: Processes) -> None:
    metrics = RayMetrics(run_id="headrace-1", run="quickstart")
    metrics.row(row(1, **{"reward/letter e": 0.25, "lag_steps_max": 2.0}))
    metrics.row(row(2, **{"reward/letter e": 0.75, "lag_steps_max": 1.0}))
    for kind in ("death", "death", "restart"):
        metrics.event(Event(kind, "rollout-0"))

    async def watch_a_job() -> None:
        bound = StalenessBound(1, 4)
        queue = ExperienceQueue(bound, max_samples=64, max_bytes=1 << 20)
        await queue.put(ScoredGroup("g00000000", 0, (scored_rollout("t0"), scored_rollout("t1"))))
        counts = WorkerCounts(wanted=3, running=2, starting=1, pending=1, draining=4)
        job: Any = SimpleNamespace(queue=queue, leases=LeaseBook(bound, 2), pool=SimpleNamespace(counts=lambda: counts))
        watching = asyncio.create_task(watch(job, metrics))
        await asyncio.sleep(0)
        watching.cancel()

    asyncio.run(watch_a_job())
    metrics.close()
    metrics.event(Event("end", "the run"))
    of_run = 'run="quickstart",run_id="headrace-1"'
    expected = {
        f"ray_headrace_step{{{of_run}}}": 2.0,
        f"ray_headrace_reward_mean{{{of_run}}}": 1.0,
        f'ray_headrace_reward_component{{component="letter e",{of_run}}}': 0.75,
        f"ray_headrace_lag_steps_max{{{of_run}}}": 1.0,
        f"ray_headrace_trained_samples_total{{{of_run}}}": 64.0,
        f'ray_headrace_sent_bytes_total{{kind="delta",{of_run}}}': 2000.0,
        f'ray_headrace_events_total{{event="death",{of_run}}}': 2.0,
        f'ray_headrace_events_total{{event="restart",{of_run}}}': 1.0,
        f"ray_headrace_queue_samples{{{of_run}}}": 2.0,
        f"ray_headrace_open_groups{{{of_run}}}": 0.0,
        f'ray_headrace_workers{{{of_run},state="wanted"}}': 3.0,
        f'ray_headrace_workers{{{of_run},state="ready"}}': 2.0,
        f'ray_headrace_workers{{{of_run},state="starting"}}': 1.0,
        f'ray_headrace_workers{{{of_run},state="pending"}}': 1.0,
        f'ray_headrace_workers{{{of_run},state="draining"}}': 4.0,
    }
    expires = time.monotonic() + 40  # Ray sends them every 10 s
    while not expected.keys() <= (found := endpoint()).keys() and time.monotonic() < expires:
        time.sleep(0.5)
    assert {name: found.get(name) for name in expected} == expected
    assert not [name for name in found if 'event="end"' in name]
    assert not [name for name in found if "digest" in name or name.startswith("ray_headrace_time")]


# The page and the dashboard


def written_by_the_code() -> set[str]:
    """Keys of rows, read from the code that makes them."""
    makers = {
        "cluster/metrics.py": ("row", "reward_metrics"),
        "cluster/train.py": ("publish",),
        "actors/delivery.py": ("take_costs",),
        "learner/metrics.py": ("batch_metrics", "update_metrics", "lag_metrics"),
        "learner/ppo.py": ("step",),
    }
    keys = set()
    for file, functions in makers.items():
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in functions:
                dicts = [each for each in ast.walk(node) if isinstance(each, ast.Dict)]
                keys |= {str(key.value) for each in dicts for key in each.keys if isinstance(key, ast.Constant)}
    return keys


def test_the_page_explains_every_curve_and_no_other() -> None:
    """tests/cluster/test_train.py compares it with the rows of a whole run too."""
    explained, written = documented_curves(), written_by_the_code()
    assert len(written) > 40
    ours = {f"ray_headrace_{name}" for name in GAUGES} | {f"ray_headrace_{name}_total" for name in COUNTERS}
    assert written - explained == set()
    assert ours - explained == set()
    of_reward = {"reward/NAME", "reward/NAME/std", "reward/NAME/latent"}  # written with the names of a run
    by_name = {"watch/NAME", "watch/NAME_drift", "watch/alarms"} | of_reward
    assert explained - written - ours == by_name


def test_the_page_and_that_of_the_run_directory_name_the_same_curves() -> None:
    text = (ROOT / "docs" / "run-directory.md").read_text(encoding="utf-8")
    table = text.split("## metrics.jsonl")[1].split("\n## ")[0]
    names: set[str] = set()
    for cell in re.findall(r"^\| (\w.*?) \|", table, re.MULTILINE):
        first, *rest = cell.split(", ")
        stem = first.rsplit("_", 1)[0]
        names |= {first, *(stem + name if name.startswith("_") else name for name in rest)}
    assert len(names) > 30
    assert names - documented_curves() == {"key"}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "headrace.json").read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked: set[str] = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            names = re.findall(r"ray_headrace_\w+", target["expr"])
            assert len(names) == target["expr"].count("{run=~"), f"{target['expr']}: of which run?"
            asked |= set(names)
    ours = {f"ray_headrace_{name}" for name in GAUGES} | {f"ray_headrace_{name}_total" for name in COUNTERS}
    curves = written_by_the_code() - {"time", "weights_digest"}
    assert asked - ours - {f"ray_headrace_{name}" for name in curves} == set()
    assert len(asked) > 25
    assert ours - asked == set()
