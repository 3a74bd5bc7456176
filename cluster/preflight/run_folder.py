"""The run folder before a run: free for a new one, or to be continued, and then under which settings.

What may change when a run is resumed is what does not alter what is learned from a given batch: how long, where
and with how many workers, and what is logged. Everything else would mix two experiments in one metrics file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from cluster.doctor.machine import existing_ancestor
from contracts import loading as configuration
from contracts.config import Config, ConfigError

# Dotted names; a name stands for everything below it. docs list the same.
MAY_CHANGE_ON_RESUME = (
    "steps",
    "resume",
    "output_dir",  # a run folder may be moved
    "rollout",
    "reward_workers",
    "reference_workers",
    "learner",
    "deadlines",
    "checkpoint",
    "ray",
    "logging",
    "evaluation",
    "watch",
    "labelling",
    "serving",
)
# Of a deterministic run they stay: batch shapes and threads decide its bits.
_DECISIVE_WHEN_DETERMINISTIC = ("rollout", "reward_workers", "reference_workers", "learner")
_RUN_FILES = ("config.yaml", "metrics.jsonl", "checkpoints")
_SHOWN_DIFFERENCES = 5


def check_output_dir(config: Config) -> tuple[int | None, int]:
    """The checkpoint to resume from (0: the initial model; None: a fresh run) and the number of finished checkpoints.

    Raises:
        ConfigError: the folder cannot be written, holds another run, or cannot be resumed as configured.
    """
    folder = config.output_dir
    ancestor = existing_ancestor(folder)
    if not ancestor.is_dir():
        raise ConfigError(f"output_dir {folder}: {ancestor} is a file; choose another folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir {folder}: {ancestor} cannot be written by this user; choose another folder")
    holds_run = any((folder / name).exists() for name in _RUN_FILES)
    if not config.resume:
        if holds_run:
            raise ConfigError(
                f"output_dir {folder} holds another run: choose another, remove it, or continue it with resume=true"
            )
        return None, 0
    if not holds_run:
        raise ConfigError(f"output_dir {folder}: there is no run to resume; start one without resume=true")
    steps = finished_checkpoints(folder)
    _check_same_run(config)
    return (steps[-1] if steps else 0), len(steps)


def finished_checkpoints(output_dir: Path) -> list[int]:
    """Steps of the checkpoints that are complete: their manifest is written last. Ascending."""
    manifests = (output_dir / "checkpoints").glob("step-*/MANIFEST.json")
    matches = (re.fullmatch(r"step-(\d+)", manifest.parent.name) for manifest in manifests)
    return sorted(int(match.group(1)) for match in matches if match)


def differences(saved: Config, current: Config) -> list[str]:
    """`field: saved -> current` for every setting that differs and may not change on resume."""
    before, after = flat(saved.model_dump(mode="json")), flat(current.model_dump(mode="json"))
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not _may_change(name, deterministic=saved.deterministic)
    ]


def _check_same_run(config: Config) -> None:
    saved_file = config.output_dir / "config.yaml"
    different = differences(configuration.load(saved_file), config)
    if different:
        shown = "; ".join(different[:_SHOWN_DIFFERENCES])
        more = f" and {len(different) - _SHOWN_DIFFERENCES} more" if len(different) > _SHOWN_DIFFERENCES else ""
        raise ConfigError(
            f"resume: not the run of {saved_file}, these may not change ({shown}{more}); "
            "set them back or choose another output_dir"
        )


def _may_change(name: str, *, deterministic: bool) -> bool:
    if deterministic and name.split(".")[0] in _DECISIVE_WHEN_DETERMINISTIC:
        return False
    return any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_CHANGE_ON_RESUME)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves by dotted name; an empty section or list is a leaf."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {name: value}
    prefix = f"{name}." if name else ""
    return {leaf: entry for key, item in items for leaf, entry in flat(item, f"{prefix}{key}").items()}
