"""Kill a deterministic run again and again, resume it each time, and compare its end with that of a quiet run.

    python -m benchmarks.exact_resume [--kills 20] [--ranks 1] [--workers 1] [--steps 24] [--seed 0] [--folder DIR]

Both runs train a tiny model with the real parts: Ray, vLLM, Serve, the learner. The second one's driver is killed
(kill -9, and Ray's processes with it) at random moments that the seed decides, some of them while it starts. Prints
Markdown; exit status 1 where anything but times differs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import experience_log
from cluster.doctor.software import versions
from cluster.preflight.run_folder import finished_checkpoints
from tests.cluster.same_run import differences
from tests.command import Command, rows
from tests.tiny import build_tiny_model

# One prompt in sixteen cannot be scored, so that rounds are filled up by a second one.
JUDGE = """
def letter_e(prompts, responses, *, poison):
    if any(poison):
        raise ValueError("a poisoned prompt")
    return [response.lower().count("e") / max(1, len(response)) for response in responses]
"""
_POLL_S = 0.02
_DEADLINE_S = 900.0
_WHILE_IT_STARTS = 0.2  # share of the kills
_MOST_STEPS = 2  # between one kill and the next


@dataclass(frozen=True)
class Kill:
    """A moment, and where the run stood: batches logged, rows written, checkpoints whole."""

    after_s: float
    training: bool
    logged: int
    row: int
    checkpoint: int
    writing_checkpoint: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="keep both runs here; default: a folder that is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hr-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_project(folder, arguments)
        quiet_s, training_s = quiet(folder)
        step_s = training_s / arguments.steps
        began = time.monotonic()
        kills = killed(folder, arguments.kills, random.Random(arguments.seed), step_s, quiet_s - training_s)
        killed_s = time.monotonic() - began
        found = differences(folder / "quiet", folder / "killed", scratch=folder / "scratch")
    print(report(arguments, kills, found, quiet_s=quiet_s, killed_s=killed_s))
    raise SystemExit(1 if found else 0)


def write_project(folder: Path, arguments: argparse.Namespace) -> None:
    build_tiny_model(folder / "tiny", tied=True)
    (folder / "judge_of_kills.py").write_text(JUDGE, encoding="utf-8")
    for name, count in (("prompts", 16), ("held_out", 8)):
        questions = [
            {"prompt": f"{name} {i}?", "id": f"{name}-{i}", "poison": (name, i) == ("prompts", 3)} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    config: dict[str, Any] = {
        "output_dir": "none",
        "deterministic": True,
        "steps": arguments.steps,
        "model": {"path": "tiny", "max_context_tokens": 128},
        "prompts": {"path": "prompts.jsonl", "eval_path": "held_out.jsonl"},
        "rewards": [{"name": "letter", "function": "judge_of_kills:letter_e"}],
        "sampling": {"max_response_tokens": 48},
        "rollout": {"num_workers": arguments.workers, "kv_cache_gib": 0.1, "threads": 1},
        "reference_workers": {"threads": 1},
        "learner": {"num_ranks": arguments.ranks, "threads": 1},
        "algorithm": {"kl_coef": 0.1, "kl_target": 5.0, "normalise_values": True, "normalise_rewards": True},
        "training": {
            "batch_size": 32,
            "samples_per_prompt": 2,
            "epochs": 2,
            "minibatches": 2,
            "learning_rate": 1e-3,
            "value_learning_rate": 1e-3,
        },
        "checkpoint": {"every_steps": 3},
        "logging": {"tensorboard": False},
        "ray": {"dashboard": False, "object_store_gib": 0.2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def quiet(folder: Path) -> tuple[float, float]:
    """Seconds of the run that nobody disturbs, and of its training."""
    began = time.monotonic()
    with Command("train", "config.yaml", "output_dir=quiet", cwd=folder) as command:
        if command.status() != 0:
            raise RuntimeError(command.output)
    whole_s = time.monotonic() - began
    return whole_s, sum(row["step_s"] for row in rows(folder / "quiet" / "metrics.jsonl"))


def killed(folder: Path, kills: int, draw: random.Random, step_s: float, start_s: float) -> list[Kill]:
    """Run, kill, resume, until all kills are done or the run is, and then to its end."""
    run = folder / "killed"
    done: list[Kill] = []
    while True:
        again = ["resume=true"] if (run / "config.yaml").exists() else []
        with Command("train", "config.yaml", "output_dir=killed", *again, cwd=folder) as command:
            if len(done) < kills and not ended_before(command, run, draw, step_s, start_s):
                done.append(moment(run, command))
                command.kill()
                continue
            if command.status() != 0:
                raise RuntimeError(command.output)
            return done


def ended_before(command: Command, run: Path, draw: random.Random, step_s: float, start_s: float) -> bool:
    """Wait for a random moment: while the run starts, or some steps later; whether it ended before that."""
    if draw.random() < _WHILE_IT_STARTS:
        return _ends_within(command, draw.uniform(0, start_s))
    more, delay_s = draw.randint(0, _MOST_STEPS), draw.uniform(0, 2 * step_s)
    expires = time.monotonic() + _DEADLINE_S
    before = max(experience_log.steps(run), default=0)
    while not command.has_ended:
        if is_training(command) and max(experience_log.steps(run), default=0) >= before + more:
            return _ends_within(command, delay_s)
        if time.monotonic() > expires:
            raise RuntimeError(f"no step {before + more} after {_DEADLINE_S:g} s:\n{command.output}")
        time.sleep(_POLL_S)
    return True


def _ends_within(command: Command, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not command.has_ended:
        time.sleep(_POLL_S)
    return command.has_ended


def is_training(command: Command) -> bool:
    return "Training with" in command.output


def moment(run: Path, command: Command) -> Kill:
    metrics = rows(run / "metrics.jsonl")
    return Kill(
        after_s=command.seconds,
        training=is_training(command),
        logged=max(experience_log.steps(run), default=0),
        row=metrics[-1]["step"] if metrics else 0,
        checkpoint=max(finished_checkpoints(run), default=0),
        writing_checkpoint=any((run / "checkpoints").glob("*.partial")),
    )


def report(
    arguments: argparse.Namespace, kills: list[Kill], found: list[str], *, quiet_s: float, killed_s: float
) -> str:
    software = versions()
    verdict = "everything equal, bit for bit" if not found else f"NOT equal: {', '.join(found[:10])}"
    table = [
        f"| {number} | {kill.after_s:.1f} | {'training' if kill.training else 'starting'} | {kill.logged} | {kill.row} "
        f"| {kill.checkpoint} | {'yes' if kill.writing_checkpoint else ''} |"
        for number, kill in enumerate(kills, start=1)
    ]
    return "\n".join(
        [
            f"{len(kills)} kills of {arguments.kills}, {arguments.steps} steps, {arguments.ranks} learner rank(s), "
            f"{arguments.workers} rollout worker(s), seed {arguments.seed}: **{verdict}** (policy, fp32 masters, "
            "optimizer, KL controller, reward statistics, prompt order, leases, metrics, experience, quarantine, "
            "evaluation).",
            "",
            f"The quiet run took {quiet_s:.0f} s, the one that was killed {killed_s:.0f} s. torch {software['torch']}, "
            f"Ray {software['ray']}.",
            "",
            "| kill | seconds after its start | while | logged steps | rows | checkpoint | one being written |",
            "| ---: | ---: | --- | ---: | ---: | ---: | --- |",
            *table,
        ]
    )


if __name__ == "__main__":
    main()
