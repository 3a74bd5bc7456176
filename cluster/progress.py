"""What a person sees while a run goes on.

On a terminal one live display at the bottom: the phase, a bar of the steps, the newest numbers, and what is being
waited for and since when. Elsewhere (a log file, a Ray job) plain lines without control characters, one for each
phase and step, and while something is being waited for a line every 30 s, so that a log never falls silent.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from actors.roster import WorkerCounts

RECENT_STEPS = 10  # time left follows a run that gets slower, but not every single step


@dataclass(frozen=True)
class _View:
    """All that is shown. Replaced as a whole, so the display's thread reads it without a lock."""

    phase: str = ""
    phase_since: float = 0.0
    waiting: str = ""
    waiting_since: float = 0.0
    step: int = 0
    step_at: float = 0.0
    numbers: str = ""
    workers: str = ""
    time_left_s: float | None = None


class Progress:
    """Phases, steps and waits of a run, shown on `console` between entering and leaving the context.

    Consumes calls from the main loop, which never block on it. Waits for nothing; its one thread, off a terminal,
    wakes every `heartbeat_s` to name what the run waits for, and ends with the context.
    """

    def __init__(
        self,
        steps: int,
        *,
        console: Console | None = None,
        heartbeat_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = steps
        # stderr, as for every progress display: stdout is for what a command answers.
        self._console = console or Console(stderr=True)
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._view = _View()
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None
        self._live: Live | None = None
        self.phases: list[tuple[float, str]] = []  # Unix seconds at which each began
        self.on_phase: Callable[[str], None] = lambda text: None

    def __enter__(self) -> Self:
        self._ended.clear()
        if self._console.is_interactive:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                redirect_stdout=sys.stdout.isatty(),  # `headrace train > file` keeps its output in the file
            )
            self._live.start()
        else:
            self._heart = threading.Thread(target=self._beat, name="progress-heartbeat", daemon=True)
            self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        if self._live is not None:
            self._change(waiting="")  # the last frame stays: nothing is being waited for any more
            self._live.stop()
            self._live = None

    def phase(self, text: str) -> None:
        """What the run does from now on."""
        last, now = self._view, self._clock()
        text = self._printable(text)
        if text == last.phase:
            return
        self._change(phase=text, phase_since=now)
        self.phases.append((time.time(), text))
        self.on_phase(text)
        if self._live is None:
            self._print(text)
        elif last.phase:  # the display shows only the newest phase, so the finished one becomes a line above it
            self._print(f"{last.phase}: {duration(now - last.phase_since)}", style="dim")

    def waiting(self, text: str) -> None:
        """What the run cannot go on without; "" when it goes on. The same text again does not restart its clock."""
        text = self._printable(text)
        if text != self._view.waiting:
            self._change(waiting=text, waiting_since=self._clock())

    def step(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl. A key that is missing is not shown."""
        number = _number(row, "step")
        step = self._view.step + 1 if number is None else int(number)
        seconds = _number(row, "step_s")
        if seconds is not None and seconds >= 0:
            self._recent_s.append(seconds)
        left = None
        if self._recent_s:
            left = sum(self._recent_s) / len(self._recent_s) * max(self._steps - step, 0)
        numbers = _numbers(row)
        self._change(step=step, step_at=self._clock(), numbers=numbers, time_left_s=left)
        if self._live is None:
            time_left = f"{duration(left)} left" if left is not None else ""
            parts = [f"step {step}/{self._steps}", numbers, self._view.workers, time_left]
            self._print("  ".join(filter(None, parts)))

    def workers(self, counts: WorkerCounts) -> None:
        """How many rollout workers there are, and should be; not shown for a run that never says."""
        shown = {"running": counts.running, "starting": counts.starting - counts.pending}
        shown |= {"pending": counts.pending, "draining": counts.draining}
        states = ", ".join(f"{count} {state}" for state, count in shown.items() if count) or "none"
        self._change(workers=f"workers: {counts.wanted} wanted, {states}")

    def note(self, text: str) -> None:
        """A line that stays, above the display."""
        self._print(self._printable(text))

    def result(self, table: RenderableType) -> None:
        """A table or other result that stays, above the display."""
        self._console.print(table)

    def warn(self, text: str) -> None:
        """Like `note`, marked as a warning."""
        self._print(f"warning: {self._printable(text)}", style="yellow")

    @property
    def time_left_s(self) -> float | None:
        """Mean of the recent steps times the steps that remain, at the end of the last step; None before the first.

        Only steps of this process count: those from before a resume may have run on another machine.
        """
        return self._view.time_left_s

    def _change(self, **fields: Any) -> None:
        with self._lock:
            self._view = replace(self._view, **fields)

    def _printable(self, text: str) -> str:
        """One line without control characters: names and errors come from elsewhere, and a log is not a terminal."""
        line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
        return line.encode(self._console.encoding, "replace").decode(self._console.encoding)

    def _print(self, line: str, style: str = "") -> None:
        if self._live is not None:
            self._console.print(Text(line, style=style))
            return
        # no_wrap and crop: a log line is one line however long, and carries no style even under FORCE_COLOR.
        # Rich flushes after each print.
        self._console.print(Text(line), soft_wrap=True, no_wrap=True, crop=False)

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            view = self._view
            if view.waiting:
                self._print(f"waiting for {view.waiting}, {duration(self._clock() - view.waiting_since)} so far")

    def _render(self) -> RenderableType:
        view, now = self._view, self._clock()
        lines: list[RenderableType] = []
        if view.phase:
            lines.append(Text(f"{view.phase} ({duration(now - view.phase_since)})", style="bold"))
        bar = Table.grid(padding=(0, 1))
        left = "" if view.time_left_s is None else f"{duration(max(view.time_left_s - (now - view.step_at), 0))} left"
        bar.add_row(
            Text(f"step {view.step}/{self._steps}"),
            ProgressBar(total=max(self._steps, 1), completed=min(view.step, self._steps), width=30),
            Text(left),
        )
        lines.append(bar)
        if view.numbers:
            lines.append(Text(view.numbers))
        if view.workers:
            lines.append(Text(view.workers))
        if view.waiting:
            lines.append(Text(f"waiting for {view.waiting}, {duration(now - view.waiting_since)}", style="dim"))
        return Group(*lines)


def duration(seconds: float) -> str:
    """42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _number(row: Mapping[str, Any], key: str) -> float | None:
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def _numbers(row: Mapping[str, Any]) -> str:
    reward, kl, rate = (_number(row, key) for key in ("reward_mean", "kl_to_reference", "samples_per_s"))
    parts = (
        "" if reward is None else f"reward {reward:.3f}",
        "" if kl is None else f"KL {kl:.4f}",
        "" if rate is None else f"{rate:.2f} samples/s",
    )
    return "  ".join(filter(None, parts))
