"""What a run was writing when it ended: not whole, and no part of the run. Imports nothing that may be broken."""

from __future__ import annotations

import shutil
from pathlib import Path


def half_written(run_dir: Path) -> list[Path]:
    """Files and folders that a run has not finished to write, or to remove."""
    found = {path for pattern in ("*.partial", "*/*.partial", ".report.html.*") for path in run_dir.glob(pattern)}
    checkpoints = (path for path in run_dir.glob("checkpoints/step-*") if path.is_dir())
    return sorted(found | {path for path in checkpoints if not (path / "MANIFEST.json").exists()})


def sweep(run_dir: Path) -> None:
    """Remove what is half-written; for a run that nobody else writes."""
    for path in half_written(run_dir):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a rank may still write, if it was not stopped in time
        else:
            path.unlink(missing_ok=True)
