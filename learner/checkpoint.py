"""Checkpoints that are whole or do not count: written beside, manifest last, renamed into place.

A checkpoint is `checkpoints/step-NNNNNN/` with `policy/`, `state/` and `MANIFEST.json` (path -> SHA-256).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from contracts.records import SCHEMA_VERSION

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    step: int
    path: Path

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def adapter(self) -> Path:
        """Of a run with LoRA: the policy as a PEFT folder over the model that the run started from."""
        return self.path / "policy_adapter"

    @property
    def state(self) -> Path:
        return self.path / "state"


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it counts."""
    return run_dir / "checkpoints" / f"step-{step:06d}.partial"


def begin(run_dir: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; it does not count until `finish`."""
    folder = folder_of(run_dir, step)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "state").mkdir(parents=True)
    return folder


def finish(folder: Path, step: int, *, keep: int) -> Checkpoint:
    """Write the manifest, make it durable, rename into place, remove all but the newest `keep`."""
    files = {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = folder / MANIFEST
    with manifest.open("w", encoding="utf-8") as file:
        json.dump({"schema_version": SCHEMA_VERSION, "step": step, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    final = folder.parent / f"step-{step:06d}"
    if final.exists():
        _remove(final)
    os.rename(folder, final)
    for old in finished(folder.parent.parent)[:-keep]:
        _remove(old.path)
    return Checkpoint(step, final)


def _remove(path: Path) -> None:
    """Under another name first: half removed, it must not pass for a damaged checkpoint."""
    removed = path.with_name(f"{path.name}.removed.partial")
    os.rename(path, removed)
    shutil.rmtree(removed)


def discard(folder: Path) -> None:
    """Remove what was written since `begin`."""
    shutil.rmtree(folder, ignore_errors=True)


def size_bytes(saved: Checkpoint) -> int:
    return sum(path.stat().st_size for path in saved.path.rglob("*") if path.is_file())


def finished(run_dir: Path) -> list[Checkpoint]:
    """Checkpoints with a manifest, oldest first."""
    found = []
    for manifest in (run_dir / "checkpoints").glob(f"step-*/{MANIFEST}"):
        number = manifest.parent.name.removeprefix("step-")
        if number.isdecimal():  # not a .partial, nor a copy that someone made
            found.append(Checkpoint(int(number), manifest.parent))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def verify(checkpoint: Checkpoint) -> None:
    """Raise ValueError naming the first file that is missing or differs from the manifest."""
    try:
        manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint.path / MANIFEST}: not a readable manifest ({error})") from error
    for name, expected in files.items():
        path = checkpoint.path / name
        if not path.is_file():
            raise ValueError(f"{path}: named in the manifest, but missing")
        if _sha256(path) != expected:
            raise ValueError(f"{path}: differs from the manifest")


def newest_whole(run_dir: Path, *, before: float = math.inf) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a step below `before` that verifies, and why newer ones were passed over."""
    problems = []
    for checkpoint in reversed([each for each in finished(run_dir) if each.step < before]):
        try:
            verify(checkpoint)
        except ValueError as error:
            problems.append(str(error))
        else:
            return checkpoint, problems
    return None, problems


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
