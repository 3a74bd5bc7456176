"""A run of the tiny model on a cluster of three nodes in this process, as an attacker sees it: files and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.chaos.audit import audit
from tests.command import rows
from tests.nodes import NodeCluster
from tests.tiny import build_tiny_model

ROOT = Path(__file__).parents[2]
NUM_WORKERS, GROUP, BATCH, LAG, PROMPTS = 2, 2, 32, 1, 64
CHECKPOINT_EVERY, KEEP = 5, 3
NODE_CPUS, NODE_RESOURCES = 2, {"rollout": 2.0, "learner": 2.0}  # one node can hold what two do
JUDGE = '''
import time

def letter_e(prompts, responses):
    """Share of the letter e, after as long as a judge that is asked over the network takes."""
    time.sleep({judge_s})
    return [response.lower().count("e") / max(1, len(response)) for response in responses]
'''


def configuration(model: Path, run_dir: Path, *, address: str, steps: int, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(run_dir),
        "steps": steps,
        "seed": seed,
        "model": {"path": str(model), "max_context_tokens": 256},
        "prompts": {"path": "prompts.jsonl", "eval_count": 0},
        "rewards": [{"name": "letter", "function": "judge_of_chaos:letter_e"}],
        "sampling": {"max_response_tokens": 64},
        "rollout": {
            "num_workers": NUM_WORKERS,
            "num_cpus": 0.1,
            "threads": 1,
            "kv_cache_gib": 0.1,
            "max_concurrent": BATCH,
            "resources": {"rollout": 1},
        },
        "reward_workers": {"num_cpus": 0.1, "threads": 1},
        "reference_workers": {"num_cpus": 0.1, "threads": 1},
        "learner": {"num_ranks": 2, "num_cpus": 0.1, "threads": 1, "resources": {"learner": 1}},
        "algorithm": {"kl_coef": 0.0},
        "training": {
            "batch_size": BATCH,
            "samples_per_prompt": GROUP,
            "epochs": 2,
            "minibatches": 2,
            "learning_rate": 3e-4,
            "value_learning_rate": 1e-3,
            "dtype": "float32",
        },
        "streaming": {"max_lag_steps": LAG},
        "checkpoint": {"every_steps": CHECKPOINT_EVERY, "keep": KEEP},
        "deadlines": {
            "start_s": 300,
            "lease_s": 180,
            "score_s": 120,
            "weights_s": 60,
            "learn_s": 300,
            "rank_s": 40,
            "checkpoint_s": 120,
            "silent_s": 20,
            "health_s": 5,
            "disk_s": 300,
        },
        "ray": {"address": address, "dashboard": False},
        "logging": {"tensorboard": False},
    }


class Attacked:
    """A run in `folder`; its run folder is `folder/disk/run`, where a small disk may be mounted on `disk`."""

    def __init__(self, folder: Path, cluster: NodeCluster, *, steps: int, seed: int, judge_s: float) -> None:
        self.folder, self.cluster, self.steps, self.seed = folder, cluster, steps, seed
        self.run_dir = folder / "disk" / "run"
        self.driver: subprocess.Popen[bytes] | None = None
        model = build_tiny_model(folder / "model", tied=True)
        (folder / "judge_of_chaos.py").write_text(JUDGE.format(judge_s=judge_s))
        self._prompt_ids = [str(number) for number in range(PROMPTS)]
        prompts = [json.dumps({"prompt": f"Question {each}?", "id": each}) for each in self._prompt_ids]
        (folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in prompts))
        config = configuration(model, self.run_dir, address=cluster.address, steps=steps, seed=seed)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def start(self, *, resume: bool = False) -> None:
        """The driver, in a process of its own."""
        path = os.pathsep.join([str(ROOT), str(self.folder)])
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos.driver", "train", "config.yaml", f"resume={resume}".lower()],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": path, "SPT_NOENV": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill_driver(self) -> int:
        """kill -9; returns its process id."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait(30)
        return self.driver.pid

    def stop(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.kill_driver()

    @property
    def ended(self) -> int | None:
        """The driver's exit status; None while it runs."""
        return None if self.driver is None else self.driver.poll()

    @property
    def events(self) -> list[dict[str, Any]]:
        return rows(self.run_dir / "events.jsonl")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return rows(self.run_dir / "metrics.jsonl")

    @property
    def step(self) -> int:
        found = self.rows
        return int(found[-1]["step"]) if found else 0

    @property
    def checkpoints(self) -> list[Path]:
        """Finished ones, oldest first."""
        return sorted(path.parent for path in self.run_dir.glob("checkpoints/step-*[0-9]/MANIFEST.json"))

    def processes(self, title: str) -> list[psutil.Process]:
        """Of the cluster, by the begin of their title, in order of their age."""
        found = [each for each in psutil.Process().children(recursive=True) if _title(each).startswith(title)]
        return sorted(found, key=lambda process: process.create_time())

    def workers(self) -> list[tuple[psutil.Process, psutil.Process]]:
        """Rollout actors, each with its engine core."""
        actors = self.processes("ray::RolloutActor")
        found = [(actor, core) for actor in actors for core in actor.children() if "EngineCore" in _title(core)]
        if len(found) < NUM_WORKERS:
            raise Missed(f"only {len(found)} rollout actors have an engine core")
        return found

    def until(self, condition: Callable[[], Any], what: str, *, deadline_s: float) -> Any:
        """What `condition` comes to when it is true.

        Raises:
            Missed: not within the deadline, or the driver has ended.
        """
        expires = time.monotonic() + deadline_s
        while not (found := condition()):
            if self.ended is not None:
                raise Missed(f"the run ended with status {self.ended} before {what}")
            if time.monotonic() > expires:
                raise Missed(f"no {what} within {deadline_s:g} s")
            time.sleep(0.1)
        return found

    def next_step(self, *, deadline_s: float) -> None:
        """Wait until one more has finished."""
        seen = self.step
        self.until(lambda: self.step > seen, f"step after {seen}", deadline_s=deadline_s)

    def until_end(self, *, deadline_s: float) -> None:
        """Wait for the run to end by itself, for as long as each step and the end take no longer than `deadline_s`.

        Raises:
            Missed: it neither got on nor ended.
        """
        seen, expires = self.step, time.monotonic() + deadline_s
        while self.ended is None:
            if self.step > seen:
                seen, expires = self.step, time.monotonic() + deadline_s
            if time.monotonic() > expires:
                raise Missed(f"the run neither got on after step {seen} nor ended within {deadline_s:g} s")
            time.sleep(0.5)

    def proof(self) -> list[str]:
        """What is wrong with the files of the run; nothing if they prove what they should."""
        return audit(
            self.run_dir,
            steps=self.steps,
            samples_per_prompt=GROUP,
            max_lag_steps=LAG,
            prompt_ids=self._prompt_ids,
            seed=self.seed,
            rows=self.rows,
            events=self.events,
            quarantined=[row["trajectory_id"] for row in rows(self.run_dir / "quarantine.jsonl")],
        )


class Missed(RuntimeError):
    """What was waited for did not come."""


@contextmanager
def attacked(folder: Path, *, steps: int, seed: int, judge_s: float) -> Iterator[Attacked]:
    """A run that is not started yet, on a cluster of its own; both are gone afterwards."""
    import ray

    cluster = NodeCluster(head_cpus=4)
    try:
        for _ in range(2):
            cluster.add(num_cpus=NODE_CPUS, resources=NODE_RESOURCES)
        folder.mkdir(parents=True, exist_ok=True)
        run = Attacked(folder, cluster, steps=steps, seed=seed, judge_s=judge_s)
        try:
            yield run
        finally:
            run.stop()
    finally:
        ray.shutdown()
        cluster.shutdown()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
