"""A run while everything fails at random, and the proof from its files that nothing was lost, doubled or too old.

    python -m benchmarks.chaos [--seeds 0 1 2] [--steps 200] [--strikes 5] [--kinds rollout_idle driver_killed]
    python -m benchmarks.chaos --quiet --seeds 0 1 2

The tiny model of tests/tiny.py on a Ray of three nodes on this machine (Linux; root, for the small disk): two rollout
actors, two learner ranks, one replica each of reward and reference. Every kind strikes `--strikes` times, in an order
and at steps drawn from the seed, the next only after the run has recovered from the last. `--quiet` trains the same
seeds and strikes nothing: `--against` names the file (`--rewards`) that it wrote, for the comparison of the reward.
A judge that takes `--judge-s` a call makes steps long enough for the strikes to fit. Prints Markdown; status 1 where
a run failed, a strike was missed, or a proof does not hold, after saying which.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from tests.nodes import prepare

RECOVER_S = 300.0  # a strike that takes longer is one that the run did not recover from
STARTED_S = 600.0
LAST_ROWS = 20  # of the reward
QUIET_STEPS = 4  # without a strike, at either end
DISK_BYTES = 512 << 20
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--strikes", type=int, default=5, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=None, help="default: all")
    parser.add_argument("--quiet", action="store_true", help="strike nothing")
    parser.add_argument("--judge-s", type=float, default=8.0)
    parser.add_argument("--rewards", type=Path, help="JSON file to write the last rewards of each seed to")
    parser.add_argument("--against", type=Path, help="such a file of a quiet run")
    parser.add_argument("--keep", type=Path, help="folder to copy the run folders to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hrc-", dir=os.environ.get("RAY_TMPDIR")) as name:
        folder = Path(name)
        prepare(folder)  # before anything imports Ray
        raise SystemExit(chaos(arguments, folder))


def chaos(arguments: argparse.Namespace, folder: Path) -> int:
    from benchmarks.chaos.strikes import KINDS
    from cluster.doctor.software import versions

    kinds = [] if arguments.quiet else arguments.kinds or list(KINDS)
    if unknown := sorted(set(kinds) - KINDS.keys()):
        print(f"--kinds {unknown[0]}: there are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.chaos {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n", flush=True)
    took: dict[str, list[float]] = defaultdict(list)
    problems: list[str] = []
    rewards: dict[int, list[float]] = {}
    for seed in arguments.seeds:
        found = one_run(arguments, folder / f"seed-{seed}", seed, kinds, took)
        problems += [f"seed {seed}: {problem}" for problem in found[0]]
        rewards[seed] = found[1]
    print("\n| kind | strikes | seconds to recover: median | worst |\n| --- | ---: | ---: | ---: |")
    for kind in kinds:
        if took[kind]:
            print(f"| {kind} | {len(took[kind])} | {statistics.median(took[kind]):.1f} | {max(took[kind]):.1f} |")
    print()
    if arguments.rewards:
        arguments.rewards.write_text(json.dumps(rewards))
    if arguments.against:
        quiet = {int(seed): values for seed, values in json.loads(arguments.against.read_text()).items()}
        compare(rewards, quiet)
    for problem in problems:
        print(f"- {problem}")
    if not problems:
        print("Nothing lost, nothing trained twice, no response older than the bound: the files prove it.")
    return 1 if problems else 0


def one_run(
    arguments: argparse.Namespace, folder: Path, seed: int, kinds: list[str], took: dict[str, list[float]]
) -> tuple[list[str], list[float]]:
    """What went wrong, and the rewards of the last steps."""
    from benchmarks.chaos.attacked import Missed, attacked
    from tests.small_disk import small_disk

    began = time.monotonic()
    with ExitStack() as stack:
        (folder / "disk").mkdir(parents=True)
        if "disk_full" in kinds:
            stack.enter_context(small_disk(folder / "disk", DISK_BYTES))
        run = stack.enter_context(attacked(folder, steps=arguments.steps, seed=seed, judge_s=arguments.judge_s))
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            stack.callback(
                subprocess.run, ["cp", "-r", run.run_dir, folder / "driver.log", arguments.keep], check=False
            )
        run.start()
        try:
            run.until(lambda: run.step >= 1, "first step", deadline_s=STARTED_S)
            left = strike_all(run, kinds, arguments.strikes, random.Random(seed), took)
            run.until_end(deadline_s=STARTED_S)
        except Missed as missed:
            log = (folder / "driver.log").read_text(errors="replace").splitlines()[-15:]
            return [str(missed), *(f"the driver said: {line}" for line in log)], []
        problems = run.proof() if run.ended == 0 else [f"the run ended with status {run.ended}"]
        if left:
            problems.append(f"the steps ran out before {left} strikes: raise --judge-s")
        print(
            f"seed {seed}: {run.step} steps in {time.monotonic() - began:.0f} s, {len(problems)} problems", flush=True
        )
        return problems, [row["reward_mean"] for row in run.rows[-LAST_ROWS:]]


def strike_all(run: object, kinds: list[str], strikes: int, lot: random.Random, took: dict[str, list[float]]) -> int:
    """All strikes, each at a step drawn for it or, where the one before takes longer, right after that.

    Returns how many there were no steps left for.

    Raises:
        Missed: one of them could not be done, was not noticed, or the run did not recover from it.
    """
    from benchmarks.chaos.attacked import NUM_WORKERS, Attacked, Missed
    from benchmarks.chaos.recovery import has_shown, seconds_to_recover
    from benchmarks.chaos.strikes import KINDS, let_go

    assert isinstance(run, Attacked)
    order = [kind for kind in kinds for _ in range(strikes)]
    lot.shuffle(order)
    at = sorted(lot.uniform(1, max(1, run.steps - 2 * QUIET_STEPS)) for _ in order)
    for number, (kind, step) in enumerate(zip(order, at, strict=True)):
        while run.step < step:
            run.next_step(deadline_s=STARTED_S)
        if run.step > run.steps - QUIET_STEPS:
            return len(order) - number
        try:
            strike = KINDS[kind](run, lot)
        except Missed as missed:
            raise Missed(f"{kind} could not strike at step {run.step}: {missed}") from missed
        expires = time.monotonic() + RECOVER_S
        while True:
            events, rows = run.events, run.rows
            seconds = seconds_to_recover(strike, events, rows, num_workers=NUM_WORKERS, now=time.time())
            if seconds is not None:
                break
            shown = "its event is there" if has_shown(strike, events) else "no event names it"
            if run.ended is not None:
                raise Missed(f"the run ended with status {run.ended} after {kind} of {strike.victim}: {shown}")
            if time.monotonic() > expires:
                raise Missed(f"the run did not recover from {kind} of {strike.victim} in {RECOVER_S:g} s: {shown}")
            time.sleep(0.3)
        took[kind].append(seconds)
        print(f"step {run.step}: {kind} ({strike.victim}), recovered after {seconds:.1f} s", file=sys.stderr)
        for process in let_go(run):
            print(f"left behind, stopped: {process}", file=sys.stderr)
    return 0


def compare(rewards: dict[int, list[float]], quiet: dict[int, list[float]]) -> None:
    """Mean reward of the last steps with strikes less without, with a 95 % bootstrap interval over these steps."""
    import numpy as np

    print(f"| seed | reward of the last {LAST_ROWS} steps | quiet | difference, 95 % |\n| ---: | ---: | ---: | --- |")
    for seed in sorted(rewards.keys() & quiet.keys()):
        struck, still = np.array(rewards[seed]), np.array(quiet[seed])
        if not len(struck) or not len(still):
            continue
        draw = np.random.default_rng(0)
        means = [draw.choice(each, (RESAMPLES, len(each))).mean(axis=1) for each in (struck, still)]
        low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
        difference = f"{struck.mean() - still.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"| {seed} | {struck.mean():.4f} | {still.mean():.4f} | {difference} |")
    print()


if __name__ == "__main__":
    main()
