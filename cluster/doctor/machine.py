"""What this machine offers: GPUs, memory and disk, measured without torch or Ray."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import psutil

GIB = 1 << 30


def visible_gpus() -> int:
    """GPUs this process may use, counted without importing torch (which takes seconds)."""
    devices = _gpu_devices()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return devices
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if "-1" in names:  # CUDA ignores this entry and what follows
        names = names[: names.index("-1")]
    # Parts of a GPU (MIG-...) have names, and there can be more of them than devices.
    return min(len(names), devices) if all(name.isdigit() for name in names) else len(names)


def _gpu_devices() -> int:
    devices = [entry for entry in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", entry.name)]
    if devices or shutil.which("nvidia-smi") is None:
        return len(devices)
    try:  # WSL has no such device files
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def available_memory_gib() -> float:
    """Memory that new processes can have: the machine's, or what the container's limit leaves."""
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        reclaimable = re.search(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return available / GIB  # no cgroup v2 here
    if limit != "max":
        cached = int(reclaimable.group(1)) if reclaimable else 0
        available = min(available, int(limit) - used + cached)
    return available / GIB


def free_disk_gib(path: Path) -> float:
    """Free space where `path` lies or would be made."""
    return shutil.disk_usage(existing_ancestor(path)).free / GIB


def existing_ancestor(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
