"""Full disks: how to tell one from its error, and what is said of it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_TEXTS = ("No space left on device", "Disk quota exceeded")  # of the two, in the errors of native writers
_MIB = 1 << 20


class DiskFull(OSError):
    """There is no room for what has to be written; the message says for what, where, and how much is free."""


def is_full(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that a disk or a quota is full."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        known = isinstance(cause, DiskFull) or (isinstance(cause, OSError) and cause.errno in _ERRNOS)
        if known or any(text in str(cause) for text in _TEXTS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def room(folder: Path, *, needed_bytes: int | None = None) -> str:
    """How much is free where `folder` lies, and how much is needed where that is known."""
    free = f"{shutil.disk_usage(folder).free / _MIB:.1f} MiB are free on the disk of {folder}"
    return free if needed_bytes is None else f"{free}, it needs about {needed_bytes / _MIB:.1f} MiB"
