"""Trusting and asking: what aggregation gains on votes, simulated and real, and what choosing questions saves.

    python -m benchmarks.feedback reliability [--seeds 20]
    python -m benchmarks.feedback crowd [--data FOLDER]
    python -m benchmarks.feedback asking [--set harmless|crowd] [--seeds 40] [--first-seed 0] [--data FOLDER]
    python -m benchmarks.feedback speed [--judgments 100000]
    python -m benchmarks.feedback store [--judgments 100000]
    python -m benchmarks.feedback files [--rows 1000000]

`reliability` draws panels of good (right 80 %), random and hostile (right 20 %) voters, 1,000 pairs with 5 votes.
`crowd` hides a fifth of real crowd votes and lets each method foretell them. `asking` trains a small logistic model on
labels in the order in which each way asks for them, with frozen features of the texts. `speed` aggregates many votes.
`store` writes votes one by one, each synced to disk before it is acknowledged, then many at once, and aggregates them.
`files` imports files of so many rows, whole and killed on the way. Both work in the system's temporary folder (TMPDIR).
The real sets are read from ../shared/data. Intervals are 95 %. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.feedback.asking import asking
from benchmarks.feedback.crowd import crowd
from benchmarks.feedback.files import files
from benchmarks.feedback.reliability import reliability
from benchmarks.feedback.speed import speed, store
from cluster.doctor.software import versions

DATA = Path(__file__).parents[3] / "shared" / "data"
WHAT = {"reliability": reliability, "crowd": crowd, "asking": asking, "speed": speed, "store": store, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*WHAT])
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--first-seed", type=int, default=0, help="of asking: other splits of the set")
    parser.add_argument("--set", choices=["harmless", "crowd"], default="harmless")
    parser.add_argument("--judgments", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`python -m benchmarks.feedback {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores\n")
    WHAT[arguments.what](arguments)


if __name__ == "__main__":
    main()
