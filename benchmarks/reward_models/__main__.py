"""How far a reward model on real labels can be believed: many seeds of heads on frozen features of the 135M model.

    python -m benchmarks.reward_models accuracy [--seeds 10] [--pairs 1500]
    python -m benchmarks.reward_models noise [--seeds 10]
    python -m benchmarks.reward_models shortcut [--seeds 10]
    python -m benchmarks.reward_models alarms --run RUN_DIR

Real labels: HH-RLHF's harmless pairs (../shared/data, or --data). Every seed splits the prompts anew, 60 % to train,
20 % for the strength of the regularisation, 20 % to test. `accuracy` compares the head with its
baselines. `noise` flips 10, 20 and 30 % of the training labels and compares plain Bradley-Terry with the unbiased
noise-robust loss, on clean test labels. `shortcut` plants a cue that agrees with 90 % of the training labels and
with 10 % of the test labels. `alarms` lets the watch look at a run that is done, step by step, to see when it would
have raised which alarm. Features are computed once and kept in a temporary folder. Intervals are 95 %, over
seeds; test prompts of different seeds overlap, so they are narrower than those over new prompts would be. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.reward_models.accuracy import accuracy_of_heads
from benchmarks.reward_models.alarms import alarms
from benchmarks.reward_models.noise import noise
from benchmarks.reward_models.shortcut import shortcut
from cluster.doctor.software import versions

DATA = Path(__file__).parents[3] / "shared" / "data"
CACHE = Path(tempfile.gettempdir()) / "headrace-frozen-features"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "noise", "shortcut", "alarms"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--base", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.reward_models {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n", flush=True)
    {"accuracy": accuracy_of_heads, "noise": noise, "shortcut": shortcut, "alarms": alarms}[arguments.what](arguments)


if __name__ == "__main__":
    main()
