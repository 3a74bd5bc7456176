"""What a run has shown at Weights & Biases, and which curves docs/metrics.md explains."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

ROOT = Path(__file__).parents[1]


def offline_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a LevelDB log of protobufs behind a header of 7 bytes."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # a block ends with less than a header: padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            yield record
            parts = b""


def offline_runs(run_dir: Path) -> list[tuple[Any, dict[int, dict[str, Any]], int]]:
    """Of each offline run, in the order of their start: the run, its rows by step, its exit code."""
    found = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        run, rows, status = None, {}, -1
        for record in offline_records(file):
            match record.WhichOneof("record_type"):
                case "run":
                    run = record.run
                case "history":
                    items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                    rows[record.history.step.num] = items
                case "exit":
                    status = record.exit.exit_code
        found.append((run, rows, status))
    return found


def documented_curves() -> set[str]:
    """The names that docs/metrics.md explains: `code` in the first column of its tables."""
    cells = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
