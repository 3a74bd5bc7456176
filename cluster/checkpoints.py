"""A checkpoint that a person names on the command line: verified, and the configuration of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contracts import loading as configuration
from contracts.config import Config, ConfigError
from learner import checkpoint as checkpoints


def evaluation_settings(folder: Path, prompts: Path, overrides: Sequence[str]) -> tuple[Config, checkpoints.Checkpoint]:
    """The run's configuration with `prompts` in place of its own, and the verified checkpoint.

    Raises:
        ConfigError: the folder is not a whole checkpoint of a run.
    """
    saved = verified(folder)
    run_dir = folder.resolve().parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{folder}: not inside a run: {run_dir / 'config.yaml'} is missing")
    return configuration.load(run_dir / "config.yaml", [f"prompts.path={prompts}", *overrides]), saved


def verified(folder: Path) -> checkpoints.Checkpoint:
    """The checkpoint at `folder`, every file checked against its manifest.

    Raises:
        ConfigError: it is none, or damaged.
    """
    name = folder.resolve().name.removeprefix("step-")
    if not name.isdigit():
        raise ConfigError(f"{folder}: not a checkpoint; name one such as runs/NAME/checkpoints/step-000020")
    saved = checkpoints.Checkpoint(int(name), folder.resolve())
    try:
        checkpoints.verify(saved)
    except ValueError as error:
        raise ConfigError(f"{folder}: not a whole checkpoint: {error}") from error
    return saved
