"""`headrace export`: a checkpoint's policy as a plain Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cluster.checkpoints import verified
from contracts.config import ConfigError


def export_policy(folder: Path, to: Path) -> Path:
    """Verify the checkpoint, then copy its policy; the target appears whole or not at all.

    Raises:
        ConfigError: not a whole checkpoint, or `to` exists.
    """
    if to.exists():
        raise ConfigError(f"--to {to}: exists already; choose another folder")
    policy = verified(folder).policy
    partial = to.with_name(to.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(policy, partial)
    os.rename(partial, to)
    return to
