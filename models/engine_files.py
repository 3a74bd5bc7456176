"""Files that an engine exchanges with its workers: where they lie, and what killed processes left there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

WEIGHTS_FILE_PREFIX = "headrace-weights-"
_OPENMP_PREFIX = "__KMP_REGISTERED_LIB_"  # with a process and a user id behind it: Intel's OpenMP, 1 KB a process


def weights_folder() -> Path:
    """Where files for the engine core lie: in memory where the system offers that."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def new_path(label: str) -> Path:
    """A name that no other file has; its process id tells `remove_leftovers` whose it is."""
    return weights_folder() / f"{WEIGHTS_FILE_PREFIX}{os.getpid()}-{label}-{time.monotonic_ns()}"


def remove_leftovers() -> None:
    """Delete files of killed processes: weights, while an engine started or took an adapter, and marks of OpenMP."""
    for mark in weights_folder().glob(f"{_OPENMP_PREFIX}*_{os.getuid()}"):
        pid = mark.name.removeprefix(_OPENMP_PREFIX).partition("_")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            mark.unlink(missing_ok=True)
    for path in weights_folder().glob(f"{WEIGHTS_FILE_PREFIX}*"):
        pid = path.name.removeprefix(WEIGHTS_FILE_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
