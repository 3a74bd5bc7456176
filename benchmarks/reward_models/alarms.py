"""What the watch would have said of a run, from its experience log: thresholds are tried on runs that are done."""

from __future__ import annotations

import argparse

from cluster import experience_log
from cluster.run_log import metrics_rows
from cluster.watch import Watch
from contracts.loading import load
from contracts.watch import WatchConfig


def alarms(arguments: argparse.Namespace) -> None:
    """Each alarm that would have been raised, with reward and KL at its onset; then the largest drifts."""
    if arguments.run is None:
        raise SystemExit("give --run the folder of a run with its experience log")
    config = load(arguments.run / "config.yaml")
    watch = Watch(config.watch or WatchConfig(), {component.name: component.weight for component in config.rewards})
    rows = metrics_rows(arguments.run)
    steps = experience_log.steps(arguments.run)
    largest: dict[str, tuple[float, int]] = {}
    print(f"{len(steps)} steps, the first {watch.config.reference_steps} are the reference window\n")
    print("| alarm | onset | raised | drift when raised | reward at onset | KL at onset |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for step in steps:
        seen = watch.step(step, experience_log.batch(arguments.run, step))
        for alarm in seen.raised:
            row = rows.get(alarm.onset, {})
            known = " | ".join(f"{row[key]:.2f}" if key in row else "-" for key in ("reward_mean", "kl_to_reference"))
            print(f"| {alarm.name} | {alarm.onset} | {alarm.step} | {alarm.drift:.1f} | {known} |", flush=True)
        for key, drift in seen.row.items():
            if key.endswith("_drift") and drift > largest.get(key, (float("-inf"), 0))[0]:
                largest[key] = drift, step
    told = (
        f"{key[len('watch/') : -len('_drift')]} {drift:.2f} (step {step})" for key, (drift, step) in largest.items()
    )
    print(f"\nLargest drifts: {', '.join(told)}")
