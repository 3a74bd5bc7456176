"""What reliability costs: samples per second with checkpoints, logs and deadlines, and without them.

    python -m benchmarks.reliability_cost [--steps 12] [--rounds 2] [--every-steps 4]

Trains GRPO on the bundled model, in turns as it is and bare. A bare run's driver writes no experience log,
waits without deadlines, does not watch the learner's ranks, and checkpoints after its last step only, which is not
counted. Rates are samples after the first step over wall seconds, checkpoints in between counted. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from benchmarks.streaming import MODEL, PROMPTS
from cluster.doctor.software import versions
from cluster.loopback import stay_on_loopback
from contracts import waiting

T = TypeVar("T")
BARE = "--bare"  # then a configuration: this process is the driver of a bare run


def main() -> None:
    if sys.argv[1:2] == [BARE]:
        return bare(sys.argv[2])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turns")
    parser.add_argument("--every-steps", type=int, default=4, help="steps from one checkpoint to the next")
    arguments = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.reliability_cost {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n")
    print("| run | samples/s | learner busy | checkpoints | seconds of a checkpoint, median |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for is_bare in (False, True):
            rates[is_bare].append(measured(arguments.steps, arguments.every_steps, is_bare=is_bare))
    on, off = (statistics.fmean(rates[is_bare]) for is_bare in (False, True))
    print(f"\nWith reliability over bare: {on / off:.3f} ({on:.2f} and {off:.2f} samples/s)")
    return None


def measured(steps: int, every_steps: int, *, is_bare: bool) -> float:
    """Samples a second of one run; prints its row."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "output_dir": f"{folder}/run",
            "steps": steps,
            "model": {"path": MODEL, "max_context_tokens": 256},
            "prompts": {"path": PROMPTS, "eval_count": 0},
            "rewards": [{"name": "vader", "function": "examples.judges:vader"}],
            "sampling": {"max_response_tokens": 32},
            "rollout": {"kv_cache_gib": 0.5, "max_concurrent": 64},
            "algorithm": {"name": "grpo", "kl_coef": 0, "monitor_kl": False},
            "training": {"batch_size": 32, "samples_per_prompt": 4, "epochs": 1, "minibatches": 1},
            "checkpoint": {"every_steps": steps if is_bare else every_steps},
        }
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = ["benchmarks.reliability_cost", BARE] if is_bare else ["cluster.cli", "train"]
        subprocess.run([sys.executable, "-m", *command, str(path)], stdout=sys.stderr, check=True)
        rows = lines(Path(folder, "run", "metrics.jsonl"))
        written = [event for event in lines(Path(folder, "run", "events.jsonl")) if event["event"] == "checkpoint"]
    rate = sum(row["samples"] for row in rows[1:]) / (rows[-1]["time"] - rows[0]["time"])
    busy = statistics.fmean(row["learner_busy_fraction"] for row in rows[1:])
    seconds = [float(event["consequence"].rsplit(" in ", 1)[1].removesuffix(" s")) for event in written[:-1]]
    spent = f"{statistics.median(seconds):.1f}" if seconds else "none counted"
    kind = "bare" if is_bare else "as it is"
    print(f"| {kind} | {rate:.2f} | {busy:.2f} | {len(seconds)} | {spent} |", flush=True)
    return rate


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def bare(path: str) -> None:
    """`headrace train`, its reliability taken out of the driver before anybody imports it."""
    waiting.answer = without_deadline
    stay_on_loopback()  # before Ray is imported
    from cluster import experience_log
    from learner.group import LearnerGroup

    experience_log.write = lambda *_: None
    LearnerGroup._watch = for_ever  # type: ignore[method-assign]
    from cluster.cli import app

    app(["train", path])


async def without_deadline(awaitable: Awaitable[T], **_: Any) -> T:
    return await awaitable


async def for_ever(*_: Any, **__: Any) -> None:
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    main()
