"""What earlier processes left on this machine: shared-memory segments, Ray processes, a pointer to a dead cluster.

Everything here only looks; nothing is removed or stopped, for it may belong to a run that goes on.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import psutil

from cluster.doctor.finding import Finding

# models.engine_files.WEIGHTS_FILE_PREFIX; importing it here would import torch, which may be what is broken.
WEIGHTS_FILE = re.compile(r"headrace-weights-(\d+)\b")
_RAY_PROCESSES = ("raylet", "gcs_server")


def check_cluster_pointer(ray_folder: Path | None = None) -> Finding:
    """Ray's note of the current cluster: with a stale one, a plain `ray.init(num_cpus=...)` raises."""
    pointer = (ray_folder or Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray") / "ray_current_cluster"
    try:
        address = pointer.read_text().strip()
    except OSError:
        return Finding("Ray cluster file", "ok", "none")
    if own_ray_processes():
        return Finding("Ray cluster file", "ok", f"{pointer} names {address}")
    return Finding(
        "Ray cluster file", "warn", f"{pointer} names {address}, but no Ray of yours runs here", f"remove {pointer}"
    )


def check_segments(folders: tuple[Path, ...] | None = None) -> Finding:
    """Weights in shared memory whose process is gone: memory that nobody will give back."""
    folders = folders or (Path("/dev/shm"), Path(tempfile.gettempdir()))
    left, total_bytes = [], 0
    for folder in folders:
        for file in folder.glob("headrace-weights-*"):
            match = WEIGHTS_FILE.match(file.name)
            if match and not psutil.pid_exists(int(match.group(1))):
                left.append(file)
                total_bytes += _size(file)
    if not left:
        return Finding("leftover weights", "ok", "none")
    detail = f"{len(left)} files of dead processes, {total_bytes / 2**20:.0f} MiB"
    return Finding("leftover weights", "warn", detail, f"remove {' '.join(str(file) for file in left[:4])}")


def _size(file: Path) -> int:
    try:
        return sum(part.stat().st_size for part in (file, *file.rglob("*")) if part.is_file())
    except FileNotFoundError:  # its owner has just removed it
        return 0


def check_ray_processes() -> Finding:
    """A Ray of this user: meant, or left behind by a run that was killed."""
    running = own_ray_processes()
    if not running:
        return Finding("Ray processes", "ok", "none")
    detail = ", ".join(f"{name} {pid}" for pid, name in running)
    return Finding("Ray processes", "warn", detail, "if no run of yours is going on: ray stop")


def own_ray_processes() -> list[tuple[int, str]]:
    """(pid, name) of this user's raylets and GCS servers."""
    found = []
    for process in psutil.process_iter(["name", "uids", "status"]):
        uids, name = process.info["uids"], process.info["name"]
        zombie = process.info["status"] == psutil.STATUS_ZOMBIE
        if name in _RAY_PROCESSES and uids and uids.real == os.getuid() and not zombie:
            found.append((process.pid, name))
    return found
