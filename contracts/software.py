"""What a process runs on, by metadata alone: nothing is imported."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path


def installed(distribution: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
