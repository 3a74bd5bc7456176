"""Files that an engine exchanges with its workers: where they lie, and what killed processes left there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

WEIGHTS_FILE_PREFIX = "headrace-weights-"


def weights_folder() -> Path:
    """Where files for the engine core lie: in memory where the system offers that."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def new_path(label: str) -> Path:
    """A name that no other file has; its process id tells `remove_leftovers` whose it is."""
    return weights_folder() / f"{WEIGHTS_FILE_PREFIX}{os.getpid()}-{label}-{time.monotonic_ns()}"


def remove_leftovers() -> None:
    """Delete the weights files and folders of processes that were killed while an engine started or took an adapter."""
    for path in weights_folder().glob(f"{WEIGHTS_FILE_PREFIX}*"):
        pid = path.name.removeprefix(WEIGHTS_FILE_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
