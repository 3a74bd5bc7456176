"""Runs as Ray jobs: sent to a cluster, followed and stopped through the dashboard's HTTP, from any machine.

A job is the working directory and one command on it, `python -m cluster.cli train CONFIG key=value`. It goes on by
itself: who follows it may leave at any time.

Stopping: Ray's stop sends SIGTERM, on which a run finishes its step and writes a checkpoint, and SIGKILL 3 s later. How
much later is read from the environment of the process that watches over the job, and that process gets the job's own
`env_vars`: so each job brings its time along, whatever cluster it is on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster import working_dir
from cluster.progress import duration
from contracts import loading as configuration
from contracts.config import ConfigError
from contracts.waiting import NoAnswer, answer

T = TypeVar("T")
ANSWER_S = 60.0  # for one request
UPLOAD_S = 900.0  # for up to 100 MiB over a line of 1 Mbit/s
START_S = 120.0  # for a head that has just been started to take jobs
LOST_S = 300.0  # how long a dashboard that is followed may be away: a tunnel that breaks, a head that restarts
_POLL_S = 2.0
_REST_S = 10.0  # for the last lines of a job that has ended
_NOT_YET = "No available agent"  # what Ray says until a new head's agent has registered
_OUTPUT_DIR, _GRACE_S = "headrace_output_dir", "headrace_grace_s"  # in a job's metadata
_STEP = re.compile(r"^step \d+/\d+.*$", re.MULTILINE)
# Loggers of Ray's client: what they tell is told here, or nobody's business.
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env")
_SAID_GOODBYE = re.compile(r"^stopped .*$", re.MULTILINE)  # how_to_continue


class Jobs:
    """The jobs of a cluster, by the URL of its dashboard.

    Each call waits for that dashboard, at most `ANSWER_S` (submitting: `UPLOAD_S`), and raises NoAnswer then.
    """

    def __init__(self, address: str, client: JobSubmissionClient) -> None:
        self.address = address
        self._client = client

    @classmethod
    async def connect(cls, address: str) -> Jobs:
        """Raises ConfigError where no dashboard answers, or not to us."""
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {address}: the URL of a cluster's dashboard is expected, for example http://127.0.0.1:8265"
            )
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)  # Ray would let them win over the address that was asked for
        for logger in _TALKATIVE:
            logging.getLogger(logger).setLevel(logging.ERROR)
        who = f"the Ray dashboard at {address}"
        try:
            client = await _answer(lambda: JobSubmissionClient(address), who, "say its version", ANSWER_S)
        except AuthenticationError as error:
            reason = error.message.splitlines()[0]  # its str() is a page of advice
            raise ConfigError(
                f"--address {address}: {reason}; RAY_AUTH_MODE=token and the token are needed, see docs/cluster.md"
            ) from error
        except NoAnswer as error:
            raise ConfigError(f"--address {address}: {error}") from error
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # of requests, of Ray, no JSON, no version
            raise ConfigError(f"--address {address}: no Ray dashboard answers there: {error}") from error
        return cls(address, client)

    async def submit(self, job: str, entrypoint: str, runtime_env: dict[str, object], note: dict[str, str]) -> None:
        """Send the working directory that `runtime_env` names, and start the job; a head may still be starting.

        Raises:
            ConfigError: Ray refuses it.
        """

        def start() -> str:
            return self._client.submit_job(
                entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env, metadata=note
            )

        asked = f"start {job} (see whether it did with: {self.hint('status', job)})"
        began = time.monotonic()
        while True:
            try:
                await _answer(start, self._who, asked, UPLOAD_S)
                return
            except RuntimeError as error:
                if _NOT_YET not in str(error) or time.monotonic() - began > START_S:
                    raise ConfigError(f"{self._who} refuses the job: {' '.join(str(error).split())}") from error
            await asyncio.sleep(_POLL_S)

    async def details(self, job: str) -> JobDetails:
        """Raises ConfigError where there is no such job."""
        try:
            return await _answer(lambda: self._client.get_job_info(job), self._who, f"describe {job}", ANSWER_S)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            raise ConfigError(f"job {job} is not known at {self.address}") from error

    async def log(self, job: str) -> str:
        return await _answer(lambda: self._client.get_job_logs(job), self._who, f"send the log of {job}", ANSWER_S)

    async def ask_to_stop(self, job: str) -> None:
        await _answer(lambda: self._client.stop_job(job), self._who, f"stop {job}", ANSWER_S)

    async def follow(self, job: str, show: Callable[[str], None]) -> JobDetails:
        """Show the job's log as it is written, from its beginning, until the job has ended.

        Raises:
            NoAnswer: the dashboard was away for longer than `LOST_S`.
        """
        over = asyncio.Event()
        showing = asyncio.create_task(self._show_log(job, show, over))
        try:
            ended = await self.ended(job)
            over.set()
            await asyncio.wait([showing], timeout=_REST_S)
            return ended
        finally:
            showing.cancel()

    async def ended(self, job: str) -> JobDetails:
        """The job once it has ended, however long that takes; NoAnswer when the dashboard is away for `LOST_S`."""
        heard = time.monotonic()
        while True:
            try:
                details = await self.details(job)
                heard = time.monotonic()
                if details.status.is_terminal():
                    return details
            except (OSError, RuntimeError) as error:  # a NoAnswer, a broken connection, an answer of a proxy
                if time.monotonic() - heard > LOST_S:
                    raise NoAnswer(
                        f"{self._who} has not answered for {LOST_S:g} s ({error}); {job} goes on without it, follow it "
                        f"again with: {self.hint('logs', job)} --follow"
                    ) from error
            await asyncio.sleep(_POLL_S)

    async def _show_log(self, job: str, show: Callable[[str], None], over: asyncio.Event) -> None:
        """Connections break, and each new one begins with the first line again: what was shown is skipped."""
        shown = 0
        while True:
            received, complete = 0, False
            with suppress(aiohttp.ClientError, OSError, RuntimeError):  # `ended` decides when it is too long
                async for text in self._client.tail_job_logs(job):
                    received += len(text)
                    if received > shown:
                        show(text[shown - received :])
                        shown = received
                complete = True
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await over.wait()
            if complete and over.is_set():
                return

    @property
    def _who(self) -> str:
        return f"the Ray dashboard at {self.address}"

    def hint(self, command: str, job: str) -> str:
        return f"headrace {command} {job} --address {self.address}"


async def submit(
    config: Path, overrides: Sequence[str], address: str, *, excludes: Sequence[str], grace_s: int, wait: bool
) -> int:
    """Check, send, start; then follow until it ends, unless not `wait`. Returns the exit status.

    Raises:
        ConfigError: the configuration, the working directory or the address is wrong.
        NoAnswer: the dashboard did not answer.
    """
    settings = configuration.load(config, overrides)
    folder = Path.cwd()
    files = working_dir.sent_files(folder, excludes)
    path = working_dir.config_path(config, folder, files)
    working_dir.check_inputs(settings, folder, files)
    working_dir.check_size(folder, files)
    jobs = await Jobs.connect(address)
    job = f"{re.sub(r'[^A-Za-z0-9]+', '-', settings.output_dir.name)}-{uuid.uuid4().hex[:8]}"
    on_cluster = [] if settings.ray.address else ["ray.address=auto"]
    command = ["python", "-m", "cluster.cli", "train", path.as_posix(), *overrides, *on_cluster]
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s)}}
    _say(f"sending {folder}: {len(files)} files, {sum(files.values()) / 2**20:.1f} MiB")
    await jobs.submit(
        job,
        shlex.join(command),
        {"working_dir": str(folder), "excludes": list(excludes), **environment},
        {_OUTPUT_DIR: str(settings.output_dir), _GRACE_S: str(grace_s)},
    )
    print(job, flush=True)
    return await _followed(jobs, job) if wait else 0


async def show_log(job: str, address: str, *, follow: bool) -> int:
    """Print what a job has written, or follow it until it ends. Returns the exit status."""
    jobs = await Jobs.connect(address)
    await jobs.details(job)
    if follow:
        return await _followed(jobs, job)
    print(await jobs.log(job), end="")
    return 0


async def show_status(job: str, address: str) -> None:
    """Print how a job stands: its state, where the run writes, its newest step and the last line of its log."""
    jobs = await Jobs.connect(address)
    details = await jobs.details(job)
    log = await jobs.log(job)
    steps, lines = _STEP.findall(log), [line for line in log.splitlines() if line.strip()]
    for name, text in (
        ("state", _state(details)),
        ("output_dir", (details.metadata or {}).get(_OUTPUT_DIR, "not known: not started by headrace submit")),
        ("last step", steps[-1] if steps else "none yet"),
        ("last line", lines[-1] if lines else "none yet"),
    ):
        print(f"{name:<11} {text}")


async def stop(job: str, address: str) -> int:
    """Ask a run to write a checkpoint and end, and wait until it has. Returns the exit status.

    Raises:
        NoAnswer: it has not ended in its time to stop and a minute more.
    """
    jobs = await Jobs.connect(address)
    details = await jobs.details(job)
    if details.status.is_terminal():
        _say(f"{job} has ended already: {_state(details)}")
        return 0
    grace_s = (details.metadata or {}).get(_GRACE_S)
    _say(
        f"asked to finish its step and write a checkpoint; Ray kills it after {grace_s} s"
        if grace_s
        else f"{job} was not started by headrace submit: Ray kills it 3 s after it is asked, unless the cluster or the "
        "job sets RAY_JOB_STOP_WAIT_TIME_S"
    )
    await jobs.ask_to_stop(job)
    deadline_s = float(grace_s or 600) + ANSWER_S
    ended = await answer(jobs.ended(job), who=f"{job} at {address}", asked="stop", deadline_s=deadline_s)
    said = _SAID_GOODBYE.findall(await jobs.log(job))
    print(
        said[-1] if said else f"{job}: {_state(ended)}; its log does not tell of a checkpoint: Ray may have killed it"
    )
    return 0 if said or ended.status is not JobStatus.STOPPED else 1


def exit_status(details: JobDetails) -> int:
    """That of the run, where it has ended by itself; 143, as after SIGTERM, where it was stopped."""
    if details.status is JobStatus.SUCCEEDED:
        return 0
    if details.status is JobStatus.STOPPED:
        return 143
    code = details.driver_exit_code
    return code if code is not None and 0 < code < 256 else 1


async def _followed(jobs: Jobs, job: str) -> int:
    """Follow until the end, which is told in one line. Who leaves with Ctrl-C is told how to come back."""
    try:
        ended = await jobs.follow(job, lambda text: print(text, end="", flush=True))
    except asyncio.CancelledError:
        _say(f"\n{job} goes on\n  follow: {jobs.hint('logs', job)} --follow\n  stop:   {jobs.hint('stop', job)}")
        raise
    _say(f"{job}: {_state(ended)}")
    return exit_status(ended)


def _state(details: JobDetails) -> str:
    """Ray's word for it, for how long, and why where the log cannot say it."""
    text = details.status.value
    if details.start_time:
        until = details.end_time / 1000 if details.end_time else time.time()
        text += f" {'after' if details.end_time else 'for'} {duration(until - details.start_time / 1000)}"
    if details.status is JobStatus.FAILED:
        code = details.driver_exit_code
        text += f", exit status {code}" if code is not None else f": {' '.join((details.message or '').split())}"
    return text


def _say(text: str) -> None:
    """To stderr: stdout is for the job's id and its log."""
    print(text, file=sys.stderr, flush=True)


async def _answer(call: Callable[[], T], who: str, asked: str, deadline_s: float) -> T:
    """Ray's client has no time-outs: its calls run in a thread that nobody waits for longer than the deadline."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the call was made
            future.set_exception(error)

    threading.Thread(target=run, name="job-client", daemon=True).start()
    return await answer(asyncio.wrap_future(future), who=who, asked=asked, deadline_s=deadline_s)
