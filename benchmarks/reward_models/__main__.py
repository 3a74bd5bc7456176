"""How far a reward model on real labels can be believed: many seeds of heads on frozen features of the 135M model.

    python -m benchmarks.reward_models accuracy [--seeds 10] [--pairs 1500]
    python -m benchmarks.reward_models noise [--seeds 10]
    python -m benchmarks.reward_models shortcut [--seeds 10]
    python -m benchmarks.reward_models alarms --run RUN_DIR
    python -m benchmarks.reward_models overoptimise [--seeds 1] [--steps 40] [--pairs 72] [--rules mean minimum ...]
        [--keep DIR | --resume-from DIR]

Real labels: HH-RLHF's harmless pairs (../shared/data, or --data). Every seed splits the prompts anew, 60 % to train,
20 % for the strength of the regularisation, 20 % to test. `accuracy` compares the head with its
baselines. `noise` flips 10, 20 and 30 % of the training labels and compares plain Bradley-Terry with the unbiased
noise-robust loss, on clean test labels. `shortcut` plants a cue that agrees with 90 % of the training labels and
with 10 % of the test labels. `alarms` lets the watch look at a run that is done, step by step, to see when it would
have raised which alarm. `overoptimise` trains the bundled model against reward models of few simulated pairs, with no
KL penalty and a high learning rate, once for each rule that makes one reward of an ensemble (`single`: one that was
trained alone) and once on gold itself; then where gold turns down, what each alarm said before that, and what the rules
change. A run takes about a quarter of an hour on two cores; --keep keeps them, --resume-from trains what an interrupted
call lacks and reads the rest. Features are computed once and kept in a temporary folder. Intervals are 95 %, over
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
from benchmarks.reward_models.climbing import RULES
from benchmarks.reward_models.noise import noise
from benchmarks.reward_models.overoptimise import overoptimise
from benchmarks.reward_models.shortcut import shortcut
from cluster.doctor.software import versions

DATA = Path(__file__).parents[3] / "shared" / "data"
CACHE = Path(tempfile.gettempdir()) / "headrace-frozen-features"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "noise", "shortcut", "alarms", "overoptimise"])
    parser.add_argument("--seeds", type=int, help="default: 10, overoptimise 1")
    parser.add_argument("--pairs", type=int, help="default: 1500, overoptimise 72")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--base", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--run", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    run_away = parser.add_argument_group("overoptimise")
    run_away.add_argument("--steps", type=int, default=40)
    run_away.add_argument("--rules", nargs="+", choices=RULES, default=["mean", "minimum", "mean_minus_std"])
    run_away.add_argument("--members", type=int, default=4, help="of the weak ensemble")
    run_away.add_argument("--held-out-pairs", type=int, default=192, help="that train the held-out reward model")
    run_away.add_argument("--learning-rate", type=float, default=5e-5)
    run_away.add_argument("--kl-coef", type=float, default=0.0)
    run_away.add_argument("--trainable-layers", type=int, default=12, help="of the reward models")
    folders = run_away.add_mutually_exclusive_group()
    folders.add_argument("--keep", type=Path, help="keep the runs in this new folder")
    folders.add_argument("--resume-from", type=Path, help="that folder: finished runs are read, others go on")
    arguments = parser.parse_args()
    seeds, pairs = (1, 72) if arguments.what == "overoptimise" else (10, 1500)
    arguments.seeds = seeds if arguments.seeds is None else arguments.seeds
    arguments.pairs = pairs if arguments.pairs is None else arguments.pairs
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.reward_models {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n", flush=True)
    commands = {"accuracy": accuracy_of_heads, "noise": noise, "shortcut": shortcut, "alarms": alarms}
    (commands | {"overoptimise": overoptimise})[arguments.what](arguments)


if __name__ == "__main__":
    main()
