"""Weights & Biases: one W&B run for a run directory, however often it is resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.run_log import write_json
from cluster.trackers.tracker import Row, curves
from contracts.config import ConfigError, WandbConfig
from contracts.records import SCHEMA_VERSION

INSTALL = "pip install 'headrace[wandb]'"
_SHARE = 0.8  # of the tracker's deadline for W&B's own ones, because its errors say more


class WeightsAndBiases:
    """Logs each row at its step, which is the axis of every chart.

    Offline runs stay in `run_dir`/wandb until `wandb sync`. `resumed` goes on in the W&B run that wandb.json names.
    """

    name = "Weights & Biases"

    def __init__(
        self, config: WandbConfig, run_dir: Path, *, settings: Mapping[str, Any], resumed: bool, deadline_s: float
    ) -> None:
        import wandb  # an extra

        self._wandb = wandb
        self._config = config
        self._run_dir = run_dir
        self._settings = dict(settings)
        self._deadline_s = deadline_s
        self._id = _id_of(run_dir, config, resumed=resumed)
        self._run: Any = None

    def open(self) -> str:
        self._run = self._wandb.init(
            entity=self._config.entity,
            project=self._config.project,
            name=self._config.name or self._run_dir.name,
            group=self._config.group,
            tags=self._config.tags,
            mode=self._config.mode,
            id=self._id,
            resume="allow",
            dir=str(self._run_dir.resolve()),  # its service may have another working directory
            config=self._settings,
            settings=self._wandb.Settings(
                console="off",  # what a run prints is not W&B's to capture
                silent=True,
                init_timeout=_SHARE * self._deadline_s,
                finish_timeout=_SHARE * self._deadline_s,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._config.mode == "offline":
            return f"offline; later: wandb sync {Path(self._run.dir).parent}"
        return str(self._run.url)

    def write(self, row: Row) -> None:
        self._run.log({"step": row["step"], **curves(row)}, step=row["step"])

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def check_wandb(config: WandbConfig) -> None:
    """Raises ConfigError where a run could not be logged: the package is missing, or nobody is logged in."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder that is named wandb, which every W&B run leaves, is none
        raise ConfigError(f"logging.wandb: the package wandb is not installed: {INSTALL}, or leave the section out")
    if config.mode == "offline":
        return
    environment = os.environ.get("WANDB_MODE", "online")
    if environment != "online":
        raise ConfigError(
            f"logging.wandb.mode is online, but WANDB_MODE is {environment}: set logging.wandb.mode=offline or unset it"
        )
    import wandb

    problem = "nobody is logged in"
    try:
        if wandb.login(prompt=False, verify=False):
            return
    except wandb.Error as error:
        problem = " ".join(str(error).split())
    raise ConfigError(
        f"logging.wandb: {problem}: call `wandb login`, set WANDB_API_KEY, or set logging.wandb.mode=offline"
    )


def _id_of(run_dir: Path, config: WandbConfig, *, resumed: bool) -> str:
    """The id of a resumed run is that which it had, unless it goes to another project now."""
    path = run_dir / "wandb.json"
    place = {"entity": config.entity, "project": config.project}
    if resumed and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if place.items() <= before.items():
            return str(before["id"])
    new = uuid.uuid4().hex[:12]
    write_json(path, {"schema_version": SCHEMA_VERSION, "id": new, **place})
    return new
