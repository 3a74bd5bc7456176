"""What a run writes while it trains: metrics, experience, quarantine, events. Readable at any moment."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import experience_log
from cluster.half_written import sweep
from contracts.events import Event
from contracts.json_lines import JsonLines
from contracts.records import SCHEMA_VERSION, ScoredRollout


class RunLog:
    """The files of one run directory.

    Where the disk is full, `experience` and `metrics` raise the OSError, leave nothing half-written, and may be called
    again; quarantine rows and events wait in memory for the next of these calls, which writes them first.

    On resume, rows and files past `resume_step` are removed first; of metrics.jsonl rows past `last_row` and of
    quarantine.jsonl all but the first `quarantined`, where these are given.
    `on_row` and `on_event` are called with each that is written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int | None,
        last_row: int | None = None,
        quarantined: int | None = None,
    ) -> None:
        self.run_dir = run_dir
        (run_dir / "experience").mkdir(parents=True, exist_ok=True)
        metrics_path, quarantine_path = run_dir / "metrics.jsonl", run_dir / "quarantine.jsonl"
        last_row = resume_step if last_row is None else last_row
        if resume_step is not None and last_row is not None:
            _cut_rows(metrics_path, last_row)
            _cut_rows(quarantine_path, math.inf if quarantined is not None else resume_step, most=quarantined)
            self._cut_back(resume_step)
        self._metrics = JsonLines(metrics_path, synced=True)
        self._quarantine = JsonLines(quarantine_path, synced=True)
        self._step = resume_step or 0  # the last that has finished
        # Not synced to disk: it is not for a machine that crashes, and an event may come for each engine and version.
        self._events = JsonLines(run_dir / "events.jsonl", synced=False)
        self.on_row: Callable[[Mapping[str, Any]], None] = lambda row: None
        self.on_event: Callable[[Event], None] = lambda event: None

    def experience(self, step: int, batch: Sequence[ScoredRollout], state: Mapping[str, Any]) -> None:
        """Write the batch of a step and where the run stands, whole or not at all, before it is trained on."""
        self._quarantine.flush()
        self._events.flush()
        experience_log.write(self.run_dir, step, batch, state)

    def logged(self, step: int) -> list[ScoredRollout]:
        """The batch of a step, read back."""
        return experience_log.batch(self.run_dir, step)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step's row."""
        self._events.flush()
        self._metrics.append(row)
        self._step = row["step"]
        self.on_row(row)

    def quarantine(self, *, step: int, trajectory_id: str, prompt_id: str, reason: str, response: str) -> None:
        """Keep a bad trajectory with the reason; it is not trained on."""
        row = {"trajectory_id": trajectory_id, "prompt_id": prompt_id, "step": step, "reason": reason}
        self._quarantine.keep(row | {"response": response, "schema_version": SCHEMA_VERSION})
        self.event(Event("quarantine", trajectory_id, reason, "it is not trained on"))

    def event(self, event: Event) -> None:
        """Append one event with the time and the last finished step, in one write."""
        row = {"time": time.time(), **asdict(event), "step": self._step, "schema_version": SCHEMA_VERSION}
        self._events.keep(row)
        self.on_event(event)

    def close(self) -> None:
        """Nothing half-written stays: what a run was writing when it was cancelled goes."""
        for lines in (self._events, self._metrics, self._quarantine):
            if lost := lines.close():
                print(f"{lines.path}: the last {lost} lines found no room on the disk", file=sys.stderr)
        sweep(self.run_dir)

    def _cut_back(self, step: int) -> None:
        for logged in experience_log.steps(self.run_dir):
            if logged > step:
                experience_log.path_of(self.run_dir, logged).unlink()
        sweep(self.run_dir)


def metrics_rows(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The whole rows of metrics.jsonl by step; none where there is no file."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return {int(_step_of(line)): json.loads(line) for line in lines if _step_of(line) < math.inf}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _cut_rows(path: Path, step: float, *, most: int | None = None) -> None:
    """Remove the rows past `step`, and all but the first `most`. Bytes: a crash can cut a character in two."""
    if path.exists():
        whole = [line for line in path.read_bytes().split(b"\n") if _step_of(line) < math.inf]
        kept = [line for line in whole if _step_of(line) <= step][:most]
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(partial, path)


def _step_of(line: bytes) -> float:
    """The step of a row; one cut off by a crash counts as past the end."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
