"""experience/step-NNNNNN.parquet: the batch that a step trains on, and where the run stood when it was chosen.

A file appears whole or not at all, before its batch is trained on, so that a checkpoint and the files after it are all
that is needed to compute later weights again and to go on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.records import ScoredRollout, experience_records, experience_table

_STATE = b"headrace_run_state"


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "experience" / f"step-{step:06d}.parquet"


def write(run_dir: Path, step: int, batch: Sequence[ScoredRollout], state: Mapping[str, Any]) -> None:
    """The batch of a step and the run's `state` (JSON), durable when this returns.

    Raises:
        OSError: it is not written, nor is a part of it.
    """
    table = experience_table(batch)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _STATE: json.dumps(state).encode()})
    path = path_of(run_dir, step)
    partial = path.with_suffix(".partial")
    try:
        pq.write_table(table, partial, write_page_checksum=True)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def batch(run_dir: Path, step: int) -> list[ScoredRollout]:
    """The batch of a step, read back.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = path_of(run_dir, step)
    try:
        return experience_records(pq.read_table(path, page_checksum_verification=True))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged: {' '.join(str(error).split())[:200]}") from error


def state(run_dir: Path, step: int) -> dict[str, Any]:
    """Where the run stood when the batch of a step was chosen.

    Raises:
        ValueError: the file is missing or damaged, or is from before runs kept this.
    """
    path = path_of(run_dir, step)
    try:
        metadata = pq.read_schema(path).metadata or {}
        found: dict[str, Any] = json.loads(metadata.get(_STATE, b"{}"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: {' '.join(str(error).split())[:200]}") from error
    if not found:
        raise ValueError(f"{path}: does not say where the run stood")
    return found


def steps(run_dir: Path) -> list[int]:
    """Steps that have a file, ascending."""
    numbers = (path.stem.removeprefix("step-") for path in (run_dir / "experience").glob("step-*.parquet"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def last_whole(run_dir: Path, *, after: int) -> tuple[int, str]:
    """The last step up to which every batch after step `after` can be read, and why no later one can ("": all can)."""
    last = after
    for step in range(after + 1, max([after, *steps(run_dir)]) + 1):
        try:
            state(run_dir, step)
            batch(run_dir, step)
        except ValueError as problem:
            return last, str(problem)
        last = step
    return last, ""
