"""Another reward model for a running run: its replicas load it while they score, and the run tells what changed.

`roll_out` does it, for a loop that trains reward models between PPO steps. A person asks a running run for it with
`headrace reward-rollout`: the request is a file in the run directory, which the run watches, and the answer is a line
of reward_rollouts.jsonl. A resumed run starts with the reward models that were rolled out last.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.reward import NotLoaded, RewardHandle
from cluster.job import Job
from cluster.run_log import write_json
from contracts import loading as configuration
from contracts.config import Config, ConfigError
from contracts.events import Event, first_line
from contracts.json_lines import JsonLines
from contracts.records import SCHEMA_VERSION
from contracts.waiting import NoAnswer
from models.reward_card import CARD, read_card

DONE = "reward_rollouts.jsonl"
ASKED = "reward_rollout.json"
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True)
class RewardRollout:
    """A reward model that a component was to score with. `refused` says why it does not."""

    component: str
    folder: str
    version_before: str
    version: str
    step: int  # finished when it came: responses of later steps may have either version
    refused: str = ""
    request: str = ""


async def roll_out(job: Job, component: str, folder: Path, *, request: str = "") -> RewardRollout:
    """Let reward component or judge `component` of a running job score with the reward model in `folder`.

    Scoring does not stop meanwhile: each row of the experience log names the `reward_version` that scored it. Once
    this returns, all that is scored has the new one. Event `reward_rollout`, or `refusal` where it was not loaded; both
    are in reward_rollouts.jsonl.

    Raises:
        NotLoaded: a replica cannot load it; all go on with the one before.
        ValueError: no such component, or a function.
        NoAnswer: the replicas did not answer within deadlines.start_s, not about the old one either.
    """
    handle = _handle(job, component)
    path = _absolute(folder)
    try:
        before, after = await handle.load(path, deadline_s=job.config.deadlines.start_s)
    except NotLoaded as error:
        _keep(job, RewardRollout(component, path, "", "", job.version, first_line(error), request))
        job.log.event(Event("refusal", handle.who, first_line(error), "scores with the reward model before it"))
        raise
    done = RewardRollout(component, path, before, after, job.version, request=request)
    _keep(job, done)
    consequence = f"scores with it from now on; it had {before}"
    job.log.event(Event("reward_rollout", handle.who, f"reward_version {after} of {path}", consequence))
    job.progress.note(f"{handle.who}: reward_version {before} -> {after}")
    return done


async def watch(job: Job) -> None:
    """Roll out what is asked for in the run directory, for as long as the run trains."""
    file = job.config.output_dir / ASKED
    while True:
        await asyncio.sleep(_LOOK_AGAIN_S)
        try:
            asked = _taken(file)
        except ValueError as error:
            job.progress.warn(first_line(error))
            continue
        if asked is None:
            continue
        try:
            if job.config.deterministic:
                raise ValueError("the run is deterministic: when a reward model comes would decide its bits")
            await roll_out(job, asked["component"], Path(asked["folder"]), request=asked["request"])
        except NotLoaded as error:
            job.progress.warn(first_line(error))
        except (ValueError, NoAnswer) as error:
            job.progress.warn(first_line(error))
            refused = RewardRollout(
                asked["component"], asked["folder"], "", "", job.version, first_line(error), asked["request"]
            )
            _keep(job, refused)


def newest(run_dir: Path) -> dict[str, Path]:
    """The folder that each component scored with last, of those that changed.

    Raises:
        ConfigError: such a folder is gone.
    """
    folders = {row["component"]: Path(row["folder"]) for row in rows(run_dir) if not row["refused"]}
    for component, folder in folders.items():
        if not folder.is_dir():
            raise ConfigError(
                f"{run_dir / DONE}: reward component {component} scored with {folder}, which is gone; put it back"
            )
    return folders


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Of reward_rollouts.jsonl, in their order; none where there is no file."""
    file = run_dir / DONE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def ask(run_dir: Path, component: str | None, folder: Path, *, wait_s: float) -> str:
    """Ask a running run for a rollout, wait until it is done, and say so.

    Raises:
        ConfigError: no such run, component or reward model, or the run refused it.
        NoAnswer: no run took the request within `wait_s`; it is withdrawn.
    """
    name = _component(configuration.load(run_dir / "config.yaml"), component)
    if not (folder / CARD).is_file():
        raise ConfigError(f"{folder}: is no reward model of Headrace: {CARD} is missing")
    try:
        read_card(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    request, file = uuid.uuid4().hex, run_dir / ASKED
    if file.exists():
        raise ConfigError(f"{file}: another rollout is being asked for; wait for it, or remove the file")
    write_json(file, {"component": name, "folder": str(folder.resolve()), "request": request})
    expires = time.monotonic() + wait_s
    while time.monotonic() < expires:
        if answered := next((row for row in rows(run_dir) if row["request"] == request), None):
            if answered["refused"]:
                raise ConfigError(f"the run refused it: {answered['refused']}")
            return f"{name}: reward_version {answered['version_before']} -> {answered['version']}"
        time.sleep(_LOOK_AGAIN_S / 2)
    file.unlink(missing_ok=True)
    raise NoAnswer(f"no run works in {run_dir}, or it took longer than {wait_s:g} s; see its events.jsonl")


def _component(config: Config, component: str | None) -> str:
    names = [each.name for each in (*config.rewards, *config.evaluation.judges) if each.model is not None]
    if component is None and len(names) == 1:
        return names[0]
    if component not in names:
        there = ", ".join(names) or "none"
        raise ConfigError(f"--component {component or 'is needed'}: reward models of this run are: {there}")
    return component


def _handle(job: Job, component: str) -> RewardHandle:
    handles = {handle.config.name: handle for handle in (*job.rewards.handles, *job.judges.handles)}
    if component not in handles:
        raise ValueError(f"no reward component {component}; there are: {', '.join(handles)}")
    return handles[component]


def _taken(file: Path) -> dict[str, str] | None:
    """A request, which is gone then; None where there is none.

    Raises:
        ValueError: it is no request.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    file.unlink(missing_ok=True)  # it may have been withdrawn
    try:
        asked = json.loads(text)
        return {name: str(asked[name]) for name in ("component", "folder", "request")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is no request for a reward model and was removed ({error})") from error


def _absolute(folder: Path) -> str:
    """For replicas, which work in a directory of Ray's."""
    return str(folder.resolve())


def _keep(job: Job, rollout: RewardRollout) -> None:
    lines = JsonLines(job.config.output_dir / DONE, synced=True)
    lines.keep({"time": time.time(), **asdict(rollout), "schema_version": SCHEMA_VERSION})
    if lines.close():
        job.progress.warn(f"{lines.path}: no room on the disk; a resumed run would not know of {rollout.folder}")
