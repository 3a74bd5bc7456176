"""The `headrace` command as a subprocess, and the processes that it must not leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

MARK = "HEADRACE_TEST_PROCESS"
# Generous: others may work on the same two cores. A test that hangs still ends.
DEADLINE_S = 480.0


class Processes:
    """All processes that were started under one mark in the environment, wherever they were moved to since."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    @property
    def environment(self) -> dict[str, str]:
        # Ray and vLLM rename their processes, and the new title overwrites the environment unless told not to.
        return {MARK: self.mark, "SPT_NOENV": "1"}

    def alive(self, title: str = "") -> list[psutil.Process]:
        """Those that run, zombies aside, whose command line begins with `title`."""
        return [process for process in psutil.process_iter() if self._is_ours(process, title)]

    def wait_gone(self, timeout_s: float = 60.0) -> list[str]:
        """Command lines of those that still run after `timeout_s`; they are killed then."""
        expires = time.monotonic() + timeout_s
        while (left := self.alive()) and time.monotonic() < expires:
            time.sleep(0.2)
        named = [f"{process.pid} {_title(process)[:120]}" for process in left]
        for process in left:
            _kill(process)
        return named

    def _is_ours(self, process: psutil.Process, title: str) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(MARK) != self.mark:
                return False
            return _title(process).startswith(title)
        except psutil.Error:  # another user's, or gone meanwhile
            return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "gone"


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


class Command:
    """`headrace ARGUMENTS` in a session of its own; leaving the context kills whatever is left of it."""

    def __init__(self, *arguments: str | Path, cwd: Path) -> None:
        self.processes = Processes()
        self._log = cwd / f"headrace-{self.processes.mark}.log"
        environment = os.environ | self.processes.environment
        environment.pop("WANDB_SERVICE", None)  # of a test that used W&B in this process
        executable = Path(sys.executable).with_name("headrace")
        self._began = time.monotonic()
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [str(executable), *map(str, arguments)],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait(30)
        self.processes.wait_gone(0)

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._began

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def ctrl_c(self) -> None:
        """What a terminal does: SIGINT to the whole process group."""
        os.killpg(self._popen.pid, signal.SIGINT)

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        """kill -9 of the driver, and of what it leaves."""
        self._popen.kill()
        self._popen.wait(30)
        self.processes.wait_gone(0)

    def kill_driver(self) -> None:
        """kill -9 of the driver alone."""
        self._popen.kill()
        self._popen.wait(30)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for `condition`; fails with the command's output when it ends first or the deadline passes."""
        expires = time.monotonic() + DEADLINE_S
        while not condition():
            status = self._popen.poll()
            assert status is None, f"exited with {status} before {what}:\n{self.output}"
            assert time.monotonic() < expires, f"no {what} after {DEADLINE_S:g} s:\n{self.output}"
            time.sleep(0.1)

    def status(self) -> int:
        """The exit status; fails with the command's output after the deadline."""
        try:
            return self._popen.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {DEADLINE_S:g} s:\n{self.output}") from None


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; none where it does not exist yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
