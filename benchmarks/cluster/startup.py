"""Seconds from the command to the first response and the first update, and where they go, from a run's files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command import rows


@dataclass(frozen=True)
class Stage:
    """What the run did, in Unix seconds."""

    name: str
    begun: float
    ended: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="of a run that has made a step")


def measure(arguments: argparse.Namespace, folder: Path) -> int:
    events, metrics = rows(arguments.run_dir / "events.jsonl"), rows(arguments.run_dir / "metrics.jsonl")
    try:
        found = stages(events, metrics)
    except ValueError as error:
        print(f"{arguments.run_dir}: {error}", file=sys.stderr)
        return 2
    begun = found[0].begun
    print("| stage | begins after s | takes s |\n| --- | ---: | ---: |")
    for stage in found:
        print(f"| {stage.name} | {stage.begun - begun:.1f} | {stage.ended - stage.begun:.1f} |")
    print("\n| what is up | after s |\n| --- | ---: |")
    for event in events:
        if event["event"] == "start" and event["step"] == 0 and event["time"] <= found[-1].ended:
            print(f"| {event['who']} | {event['time'] - begun:.1f} |")
    return 0


def stages(events: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> list[Stage]:
    """From the newest command in these files to the end of its first step; each ends where the next begins.

    Raises:
        ValueError: no command is in there, or none of its steps.
    """
    phases = [(event["time"], event["consequence"]) for event in events if event["event"] == "phase"]
    commands = [number for number, (_, name) in enumerate(phases) if name == "The command"]
    if not commands:
        raise ValueError("events.jsonl does not say when the command began; it is from an older Headrace")
    phases = phases[commands[-1] :]
    updates = [row for row in metrics if row["time"] > phases[0][0]]
    if not updates:
        raise ValueError("metrics.jsonl has no step of the last command yet")
    first = updates[0]
    learned = first["time"] - first.get("publish_s", 0.0)
    marks = [(at, name) for at, name in phases if at < learned - first["learn_s"]]
    marks += [(learned - first["learn_s"], "The first update"), (learned, "Its weights are published")]
    ends = [*(at for at, _ in marks[1:]), first["time"]]
    return [Stage(name, at, end) for (at, name), end in zip(marks, ends, strict=True)]
