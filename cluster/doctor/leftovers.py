"""What earlier processes left on this machine: shared memory, processes, half-written files, folders of a dead Ray.

Everything here only looks; nothing is removed or stopped, for it may belong to a run that goes on.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from cluster.doctor.finding import Finding
from cluster.half_written import half_written

# models.engine_files.WEIGHTS_FILE_PREFIX; importing it here would import torch, which may be what is broken.
WEIGHTS_FILE = re.compile(r"headrace-weights-(\d+)\b")
_RAY_PROCESSES = ("raylet", "gcs_server")
_WORKERS = ("ray::", "VLLM::")  # how Ray's workers and vLLM's engines call themselves
# Of multiprocessing (vLLM's queues), torch, the object store of Ray, and Intel's OpenMP.
_SEGMENTS = ("psm_*", "torch_*", "sem.mp-*", "plasma*", "__KMP_REGISTERED_LIB_*")
_BEING_WRITTEN_S = 900.0  # as long as deadlines.checkpoint_s lets a checkpoint take
_SHOWN = 4


def default_ray_folder() -> Path:
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"


def check_cluster_pointer(ray_folder: Path | None = None) -> Finding:
    """Ray's note of the current cluster: with a stale one, a plain `ray.init(num_cpus=...)` raises."""
    pointer = (ray_folder or default_ray_folder()) / "ray_current_cluster"
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
    return Finding("leftover weights", "warn", detail, f"remove {_some(left)}")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Segments of this user that no process of theirs has mapped: vLLM's and Ray's, when they were killed."""
    files = [file for pattern in _SEGMENTS for file in folder.glob(pattern) if _is_mine(file)]
    used = _mapped() if files else set()
    left = [file for file in files if str(file) not in used]
    if not left:
        return Finding("leftover shared memory", "ok", "none")
    detail = f"{len(left)} segments that no process of yours uses, {sum(map(_size, left)) / 2**20:.0f} MiB"
    return Finding("leftover shared memory", "warn", detail, f"remove {_some(left)}")


def check_half_written(folder: Path) -> Finding:
    """What runs below `folder`, or the run that it is, were writing when they were killed."""
    runs = [folder, *(path for path in folder.glob("*") if path.is_dir())]
    found = [path for run in runs if (run / "config.yaml").exists() for path in half_written(run)]
    left = [path for path in found if time.time() - _changed(path) > _BEING_WRITTEN_S]
    if not left:
        return Finding("half-written files", "ok", f"none in {folder}")
    detail = f"{len(left)} in {folder}, {sum(map(_size, left)) / 2**20:.0f} MiB"
    advice = f"if that run is not going on: resume=true removes them, or remove {_some(left)}"
    return Finding("half-written files", "warn", detail, advice)


def check_orphans() -> Finding:
    """Workers of Ray and engines of vLLM whose Ray is gone: they hold memory, and nobody will end them."""
    left = orphans()
    if not left:
        return Finding("orphaned workers", "ok", "none")
    detail = ", ".join(f"{title} ({pid})" for pid, title in left)
    return Finding("orphaned workers", "warn", detail, f"kill {' '.join(str(pid) for pid, _ in left)}")


def check_session_folders(ray_folder: Path | None = None) -> Finding:
    """Folders of Ray sessions that no process belongs to: logs, and objects that were spilled to disk."""
    folder = ray_folder or default_ray_folder()
    lines = [line for _, line in _own_processes()]
    found = [path for path in sorted(folder.glob("session_2*")) if path.is_dir() and _is_mine(path)]
    left = [path for path in found if not any(path.name in line for line in lines)]
    if not left:
        return Finding("Ray session folders", "ok", f"none is left in {folder}")
    detail = f"{len(left)} of ended sessions in {folder}, {sum(map(_size, left)) / 2**20:.0f} MiB"
    return Finding("Ray session folders", "warn", detail, f"when their logs are not needed: remove {_some(left)}")


def orphans() -> list[tuple[int, str]]:
    """(pid, title) of this user's workers that have lost their parent."""
    found = []
    for process, line in _own_processes():
        if line.startswith(_WORKERS):
            try:
                parent = process.parent()
                if parent is None or parent.pid == 1:
                    found.append((process.pid, line[:60].strip()))
            except psutil.Error:  # it has just ended
                continue
    return found


def _own_processes() -> list[tuple[psutil.Process, str]]:
    """This user's processes with their command lines, zombies aside."""
    found = []
    for process in psutil.process_iter(["uids", "status", "cmdline"]):
        uids = process.info["uids"]
        if uids and uids.real == os.getuid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append((process, " ".join(process.info["cmdline"] or ())))
    return found


def _mapped() -> set[str]:
    """Files in memory that processes of this user have mapped or open."""
    used: set[str] = set()
    for process, _ in _own_processes():
        folder = Path("/proc", str(process.pid))
        try:
            used.update(line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines())
            used.update(os.readlink(link) for link in (folder / "fd").iterdir())
        except OSError:  # it has just ended
            continue
    return used


def _is_mine(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


def _changed(path: Path) -> float:
    """When something in it was written last."""
    try:
        return max(part.stat().st_mtime for part in (path, *path.rglob("*")))
    except FileNotFoundError:  # its owner has just removed it
        return time.time()


def _some(paths: Iterable[Path]) -> str:
    named = [str(path) for path in paths]
    return " ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")


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
