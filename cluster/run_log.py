"""What a run writes while it trains: metrics, experience, quarantine, events, TensorBoard. Readable at any moment."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from contracts.events import Event
from contracts.records import SCHEMA_VERSION, ScoredRollout, experience_records, experience_table


class RunLog:
    """The files of one run directory. On resume, rows and files past `resume_step` are removed first.

    Events stay: they tell what happened, not what counts.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None, tensorboard: bool) -> None:
        self.run_dir = run_dir
        self._experience = run_dir / "experience"
        self._experience.mkdir(parents=True, exist_ok=True)
        metrics_path, quarantine_path = run_dir / "metrics.jsonl", run_dir / "quarantine.jsonl"
        if resume_step is not None:
            for path in (metrics_path, quarantine_path):
                _cut_rows(path, resume_step)
            self._cut_back(resume_step)
        self._metrics = metrics_path.open("a", encoding="utf-8")
        self._quarantine = quarantine_path.open("a", encoding="utf-8")
        self._step = resume_step or 0  # the last that has finished
        self._events = _append_lines(run_dir / "events.jsonl")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

            purge_step = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def experience(self, step: int, batch: Sequence[ScoredRollout]) -> None:
        """Write the batch of a step, whole or not at all, before it is trained on."""
        path = self._experience / f"step-{step:06d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(experience_table(batch), partial)
        os.replace(partial, path)

    def logged(self, step: int) -> list[ScoredRollout]:
        """The batch of a step, read back."""
        return experience_records(pq.read_table(self._experience / f"step-{step:06d}.parquet"))

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step's row."""
        _append(self._metrics, row)
        self._step = row["step"]
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, row["step"])
            self._board.flush()

    def quarantine(self, *, step: int, trajectory_id: str, prompt_id: str, reason: str, response: str) -> None:
        """Keep a bad trajectory with the reason; it is not trained on."""
        row = {"trajectory_id": trajectory_id, "prompt_id": prompt_id, "step": step, "reason": reason}
        _append(self._quarantine, row | {"response": response, "schema_version": SCHEMA_VERSION})
        self.event(Event("quarantine", trajectory_id, reason, "it is not trained on"))

    def event(self, event: Event) -> None:
        """Append one event with the time and the last finished step, in one write."""
        row = {"time": time.time(), **asdict(event), "step": self._step, "schema_version": SCHEMA_VERSION}
        # Not synced to disk: it is not for a machine that crashes, and an event may come for each engine and version.
        self._events.write(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        self._events.close()
        self._metrics.close()
        self._quarantine.close()
        if self._board is not None:
            self._board.close()

    def _cut_back(self, step: int) -> None:
        for path in self._experience.glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        for partial_folder in (self.run_dir / "checkpoints").glob("*.partial"):
            shutil.rmtree(partial_folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _append(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _append_lines(path: Path) -> FileIO:
    """A file for whole lines, each one write. A last line that a crash has cut off gets its end, no event joins it."""
    file = FileIO(path, "a+")
    if size := path.stat().st_size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _cut_rows(path: Path, step: int) -> None:
    """Remove the rows past `step`. Bytes, because a crash can cut a character in two."""
    if path.exists():
        kept = [line for line in path.read_bytes().split(b"\n") if _step_of(line) <= step]
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(partial, path)


def _step_of(line: bytes) -> float:
    """The step of a row; one cut off by a crash counts as past the end."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
