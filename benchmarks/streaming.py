"""Streaming on real runs of the bundled model: bytes on the wire, pauses, overlap, and what lag does to learning.

    python -m benchmarks.streaming wire [--learning-rates 1e-6 1e-5] [--updates 1 4] [--steps 100]
    python -m benchmarks.streaming overlap [--steps 8]
    python -m benchmarks.streaming curves [--steps 24] [--seeds 0 1]
    python -m benchmarks.streaming readers

`wire` trains PPO (critic, sentiment as the reward) and reads the bytes of each broadcast from the run's metrics.
`overlap` gives the learner a core and the engine the other (Linux) and compares max_lag_steps 1 with 0: the share of
the shorter of generating and learning that the longer one hides is (T_generate + T_learn - T_step) / min(T_generate,
T_learn), both measured where nothing overlaps, T_learn with the publication. It also asks the simulator for both
throughputs, given the seconds measured at max_lag_steps 0. `curves` trains both lags on the same prompts.
`readers` puts the model's weights once and reads them from 1 to 8 actors. Prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.doctor.software import versions

MODEL = "bundled:smollm2-135m-instruct"
PROMPTS = "examples/prompts/chitchat.jsonl"
BATCH, GROUP, NEW_TOKENS = 32, 4, 48  # of `overlap`
LEARNER = "ray::LearnerRank"  # process title
READERS = (1, 2, 4, 8)
DEADLINE_S = 120.0

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["wire", "overlap", "curves", "readers"])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-6, 1e-5])
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 4], help="optimizer steps a PPO step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.streaming {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n")
    {"wire": wire, "overlap": overlap, "curves": curves, "readers": readers}[arguments.what](arguments)


def wire(arguments: argparse.Namespace) -> None:
    """Bytes of each broadcast over those of the dense weights, and the seconds that engines held requests."""
    print("| learning rate | optimizer steps a PPO step | PPO steps | bytes / dense: median | largest ", end="")
    print("| held requests, s: median | largest | publish, s | step, s |")
    print("| ---: " * 9 + "|", flush=True)
    for updates, rate in itertools.product(arguments.updates, arguments.learning_rates):
        epochs = 2 if updates % 2 == 0 else 1
        rows = train(
            arguments.steps or 100,
            sampling={"max_response_tokens": 16},
            training={
                "batch_size": 8,
                "epochs": epochs,
                "minibatches": updates // epochs,
                "learning_rate": rate,
                "micro_batch_tokens": 1024,
            },
        )
        ratios = [row["broadcast_bytes"] / row["broadcast_bytes_dense"] for row in rows]
        cells = [f"{rate:g}", str(updates), str(len(rows)), f"{100 * statistics.median(ratios):.2f} %"]
        cells += [f"{100 * max(ratios):.2f} %", f"{middle(rows, 'generation_paused_s'):.2f}"]
        cells += [f"{max(row['generation_paused_s'] for row in rows):.2f}", f"{middle(rows, 'publish_s'):.2f}"]
        print(f"| {' | '.join(cells)} | {middle(rows, 'step_s'):.1f} |", flush=True)


def overlap(arguments: argparse.Namespace) -> None:
    """How much of generation and learning goes on at the same time when each has a core of its own."""
    steps = arguments.steps or 8
    found = {
        lag: train(
            steps,
            while_running=pin,
            sampling={"max_response_tokens": NEW_TOKENS},
            rollout={"threads": 1, "max_concurrent": BATCH},
            learner={"threads": 1},
            algorithm={"name": "grpo", "kl_coef": 0, "monitor_kl": False},
            training={"batch_size": BATCH, "samples_per_prompt": GROUP, "epochs": 1, "minibatches": 1},
            streaming={"max_lag_steps": lag},
        )[1:]
        for lag in (0, 1)
    }
    generate_s = middle(found[0], "generate_s")
    learn_s = middle(found[0], "learn_s") + middle(found[0], "publish_s")
    print(
        "| max_lag_steps | samples/s | step, s | generate, s | learn, s | publish, s | learner waits, s | engine idle |"
    )
    print("| ---: " * 8 + "|")
    for lag, rows in found.items():
        names = ("step_s", "generate_s", "learn_s", "publish_s", "wait_s", "rollout_idle_fraction")
        cells = " | ".join(f"{middle(rows, name):.2f}" for name in names)
        print(f"| {lag} | {middle(rows, 'samples_per_s'):.2f} | {cells} |")
    step_s = middle(found[1], "step_s")
    hidden = (generate_s + learn_s - step_s) / min(generate_s, learn_s)
    print(
        f"\nOverlap ({generate_s:.2f} + {learn_s:.2f} - {step_s:.2f}) / {min(generate_s, learn_s):.2f} = {hidden:.2f}; "
    )
    faster = middle(found[1], "samples_per_s") / middle(found[0], "samples_per_s")
    print(f"samples per second of max_lag_steps 1 over 0: {faster:.2f}")
    simulated = {lag: predicted(found[0], lag) for lag in found}
    rates = ", ".join(f"{rate:.2f} with max_lag_steps {lag}" for lag, rate in simulated.items())
    print(f"\nThe simulator, from the seconds at max_lag_steps 0: {rates}")


def predicted(rows: Rows, lag: int) -> float:
    """Samples a second of a simulated engine and learner that take the seconds of a real on-policy run.

    An engine's step takes as long as the longest response's share of it, and a response as long as its tokens.
    """
    from cluster.simulate import simulate
    from cluster.simulated import Cluster, Workload

    share = middle(rows, "response_tokens_mean") / NEW_TOKENS
    cluster = Cluster(
        actors=1,
        slots=BATCH,
        response_s=middle(rows, "generate_s") * share,
        response_spread=1 / share - 1,
        learn_s=middle(rows, "learn_s"),
        publish_s=middle(rows, "publish_s"),
        weights_bytes=0.0,
        apply_s=middle(rows, "generation_paused_s"),
        score_s=0.0,
    )
    work = Workload(steps=40, batch_size=BATCH, group_size=GROUP, max_lag_steps=lag)
    return simulate(cluster, work).samples_per_s


def curves(arguments: argparse.Namespace) -> None:
    """Reward by samples and by seconds for max_lag_steps 0 and 1, in quarters of the run."""
    steps = arguments.steps or 24
    print("| max_lag_steps | seed | " + " | ".join(f"samples to {32 * steps * q // 4}" for q in range(1, 5)), end="")
    print(" | seconds to the end of each quarter |")
    print("| ---: " * 7 + "|", flush=True)
    for seed, lag in itertools.product(arguments.seeds, (0, 1)):
        rows = train(
            steps,
            seed=seed,
            sampling={"max_response_tokens": 24},
            training={"batch_size": 32, "epochs": 2, "minibatches": 1, "learning_rate": 2e-5},
            streaming={"max_lag_steps": lag},
        )
        quarters = [rows[steps * q // 4 : steps * (q + 1) // 4] for q in range(4)]
        rewards = " | ".join(f"{statistics.fmean(row['reward_mean'] for row in quarter):+.3f}" for quarter in quarters)
        ends = itertools.accumulate(sum(row["step_s"] for row in quarter) for quarter in quarters)
        print(f"| {lag} | {seed} | {rewards} | {' '.join(f'{end:.0f}' for end in ends)} |", flush=True)


def readers(_: argparse.Namespace) -> None:
    """One put of the whole weights, read by several actors of this machine at once."""
    from cluster.loopback import stay_on_loopback

    stay_on_loopback()  # before ray is imported

    import ray

    from models.bundled import resolve

    ray.init(address="local", num_cpus=max(READERS), include_dashboard=False, log_to_driver=False)
    try:
        frames = weights_frames(resolve(MODEL))
        began = time.perf_counter()
        refs = [ray.put(frame) for frame in frames]
        put_s = time.perf_counter() - began
        size = sum(frame.nbytes for frame in frames)
        print(f"One put of {size / 1e6:.0f} MB in {len(frames)} frames: {put_s:.2f} s.\n")
        reader: Any = ray.remote(num_cpus=1)(Reader)
        print("| reading actors | seconds until all have read every byte | memory above the store, MB an actor |")
        print("| ---: | ---: | ---: |")
        for count in READERS:
            actors: list[Any] = [reader.remote() for _ in range(count)]
            ray.get([actor.read.remote(refs[:1]) for actor in actors], timeout=DEADLINE_S)  # started, imports done
            began = time.perf_counter()
            private = ray.get([actor.read.remote(refs) for actor in actors], timeout=DEADLINE_S)
            seconds = time.perf_counter() - began
            print(f"| {count} | {seconds:.2f} | {max(private) / 1e6:.0f} |")
            for actor in actors:
                ray.kill(actor)
    finally:
        ray.shutdown()


class Reader:
    """Reads frames in place."""

    def read(self, refs: list[Any]) -> int:
        """Touch every byte; returns the growth of this process's private memory in bytes."""
        import ray

        before = psutil.Process().memory_full_info().uss
        frames = ray.get(refs, timeout=DEADLINE_S)
        total = sum(int(frame.view("uint8").sum()) for frame in frames)
        grown = psutil.Process().memory_full_info().uss - before
        return grown if total else 0


def weights_frames(folder: str) -> list[Any]:
    """The model as the frames of a keyframe."""
    import numpy as np
    from safetensors.torch import load_file

    from models.weight_stream import DeltaSender

    sender = DeltaSender()
    tensors = load_file(Path(folder, "model.safetensors"))
    return [np.frombuffer(frame, dtype=np.uint8) for frame in sender.encode(tensors.items(), 1)]


def train(steps: int, *, while_running: Callable[[], None] | None = None, seed: int = 0, **sections: Any) -> Rows:
    """Rows of metrics.jsonl of one run with sentiment as the reward."""
    rollout = {"kv_cache_gib": 0.5, "max_concurrent": 64} | sections.pop("rollout", {})
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "output_dir": f"{folder}/run",
            "steps": steps,
            "seed": seed,
            "model": {"path": MODEL, "max_context_tokens": 256},
            "prompts": {"path": PROMPTS, "eval_count": 0},
            "rollout": rollout,
            "rewards": [{"name": "vader", "function": "examples.judges:vader"}],
            "checkpoint": {"every_steps": steps},
            **sections,
        }
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        process = subprocess.Popen([sys.executable, "-m", "cluster.cli", "train", str(path)], stdout=sys.stderr)
        while process.poll() is None:
            if while_running is not None:
                while_running()
            time.sleep(1.0)
        if process.returncode != 0:
            raise SystemExit(f"the run failed with status {process.returncode}")
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pin() -> None:
    """The learner alone on core 0, the engine and the little that all others do on core 1; called again and again,
    because threads come and go."""
    for process in psutil.Process().children(recursive=True):
        try:
            title = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
            core = 0 if title.startswith(LEARNER) else 1
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {core})
        except (OSError, psutil.NoSuchProcess):
            continue


def middle(rows: Rows, name: str) -> float:
    return statistics.median(row[name] for row in rows)


if __name__ == "__main__":
    main()
