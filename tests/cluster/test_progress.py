"""The progress display: plain lines in a log, a live display on a terminal, and the arithmetic of time left."""

import asyncio
import io
import re
import time

import pytest
from rich.console import Console

from actors.roster import WorkerCounts
from cluster.progress import Progress, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class FlushedFile(io.StringIO):
    """Counts flushes: a log that is buffered for an hour is no progress display."""

    flushes = 0

    def flush(self):
        self.flushes += 1
        super().flush()


def _plain(steps=10, **options):
    file = FlushedFile()
    return Progress(steps, console=Console(file=file, force_terminal=False, width=40), **options), file


def _terminal(steps=10, **options):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, force_interactive=True, width=70, color_system=None)
    return Progress(steps, console=console, **options), file


def _row(step, step_s=10.0, **more):
    return {
        "step": step,
        "step_s": step_s,
        "reward_mean": 0.25,
        "kl_to_reference": 0.0125,
        "samples_per_s": 3.5,
        **more,
    }


def _lines(file):
    return file.getvalue().splitlines()


def test_a_log_gets_one_line_for_each_phase_step_and_note():
    progress, file = _plain()
    with progress:
        progress.phase("starting Ray")
        progress.phase("starting Ray")
        progress.phase("training")
        progress.waiting("rollout-0")
        progress.waiting("")
        progress.step(_row(1))
        progress.note("a note of more than the forty columns that this console believes it has")
        progress.warn("rollout-0 was replaced")
    assert _lines(file) == [
        "starting Ray",
        "training",
        "step 1/10  reward 0.250  KL 0.0125  3.50 samples/s  1 min 30 s left",
        "a note of more than the forty columns that this console believes it has",
        "warning: rollout-0 was replaced",
    ]
    assert file.flushes >= 5


def test_a_log_has_no_control_characters_and_no_markup():
    progress, file = _plain()
    with progress:
        progress.phase("[bold]loading[/bold] \x1b[31mred\x1b[0m\x07")
        progress.warn("Traceback:\r\n  line\u2028two\x00")
    assert _lines(file) == ["[bold]loading[/bold] [31mred [0m", "warning: Traceback: line two"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", file.getvalue())


def test_a_console_that_is_not_unicode_is_no_reason_to_fail():
    raw = io.BytesIO()
    progress = Progress(3, console=Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=False))
    with progress:
        progress.note("0.28 → 0.47")
    assert raw.getvalue() == b"0.28 ? 0.47\n"


def test_a_log_says_what_is_being_waited_for():
    clock = Clock()
    progress, file = _plain(heartbeat_s=0.02, clock=clock)
    with progress:
        time.sleep(0.1)
        assert _lines(file) == []  # nothing is waited for, nothing is said
        progress.waiting("rollout-1 to load the model")
        clock.now += 75
        progress.waiting("rollout-1 to load the model")  # said again: the clock goes on
        deadline = time.monotonic() + 10
        while not _lines(file) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert _lines(file)[0] == "waiting for rollout-1 to load the model, 1 min 15 s so far"
    count = len(_lines(file))
    time.sleep(0.1)
    assert len(_lines(file)) == count  # the thread ended with the context


def test_time_left_is_the_mean_of_recent_steps_times_what_remains():
    progress, _ = _plain(steps=100)
    assert progress.time_left_s is None
    progress.step(_row(1, step_s=4.0))
    assert progress.time_left_s == pytest.approx(4.0 * 99)
    progress.step(_row(2, step_s=8.0))
    assert progress.time_left_s == pytest.approx(6.0 * 98)
    for step in range(3, 13):  # ten more steps: the first two are forgotten
        progress.step(_row(step, step_s=2.0))
    assert progress.time_left_s == pytest.approx(2.0 * 88)
    progress.step(_row(100, step_s=2.0))
    assert progress.time_left_s == 0


def test_time_left_after_a_resume_counts_only_the_steps_that_remain():
    progress, file = _plain(steps=50)
    progress.step(_row(41, step_s=3.0))
    assert progress.time_left_s == pytest.approx(27.0)
    assert _lines(file)[0].startswith("step 41/50 ")


@pytest.mark.parametrize("make", [_plain, _terminal])
@pytest.mark.parametrize(
    "row",
    [{}, {"step": None}, {"step": 3}, {"step": 1, "step_s": float("nan")}, {"reward_mean": "high", "step_s": True},
     {"step": 99, "step_s": -1.0}],
)  # fmt: skip
def test_a_row_without_its_keys_is_shown_without_them(make, row):
    progress, file = make()
    with progress:
        progress.step(row)
        progress.step(row)
    assert progress.time_left_s is None
    assert "step" in file.getvalue()
    assert "reward" not in file.getvalue()
    assert "nan" not in file.getvalue()


def test_the_terminal_shows_phase_bar_numbers_and_wait():
    clock = Clock()
    progress, file = _terminal(clock=clock)
    with progress:
        progress.phase("training")
        progress.step(_row(4, step_s=10.0))
        progress.waiting("reward replica 1")
        clock.now += 13
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(progress._render())
        shown = capture.get()
        progress.note("checkpoint [step-000004] written")
    assert "training (13 s)" in shown
    assert re.search(r"step 4/10 .*47 s left", shown)  # 6 × 10 s, less the 13 s since the step
    assert "reward 0.250  KL 0.0125  3.50 samples/s" in shown
    assert "waiting for reward replica 1, 13 s" in shown
    assert "checkpoint [step-000004] written" in file.getvalue()
    assert file.getvalue().rstrip("\n").rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")  # the cursor is back
    last_frame = file.getvalue().rsplit("training (", 1)[1]
    assert "waiting for" not in last_frame


def test_the_terminal_keeps_a_line_for_each_finished_phase():
    clock = Clock()
    progress, file = _terminal(clock=clock)
    with progress:
        progress.phase("starting Ray")
        clock.now += 7
        progress.phase("training")
    assert "starting Ray: 7 s" in file.getvalue()


def test_an_error_passes_through_and_leaves_the_terminal_as_it_was():
    progress, file = _terminal()
    with pytest.raises(ZeroDivisionError), progress:
        progress.phase(str(1 / 0))
    assert "\x1b[?25h" in file.getvalue()


@pytest.mark.parametrize("make", [_plain, _terminal])
def test_coroutines_and_threads_may_report_at_once(make):
    progress, file = make(steps=200, heartbeat_s=0.001)

    async def report(worker):
        for step in range(50):
            await asyncio.to_thread(progress.waiting, f"worker {worker}")
            progress.step(_row(step))
            await asyncio.to_thread(progress.note, f"note {worker}-{step}")

    async def everybody():
        await asyncio.wait_for(asyncio.gather(*(report(worker) for worker in range(4))), timeout=60)

    with progress:
        asyncio.run(everybody())
    for worker in range(4):
        for step in range(50):
            assert f"note {worker}-{step}" in file.getvalue()


def test_duration():
    assert [duration(s) for s in (-3, 0, 59.4, 59.6, 185, 7620)] == [
        "0 s", "0 s", "59 s", "1 min 00 s", "3 min 05 s", "2 h 07 min",
    ]  # fmt: skip


def test_workers_that_come_and_go_are_shown():
    progress, file = _plain()
    progress.workers(WorkerCounts(wanted=4, running=2, starting=2, pending=1, draining=3))
    progress.step(_row(1))
    text = "workers: 4 wanted, 2 running, 1 starting, 1 pending, 3 draining"
    assert f"samples/s  {text}  1 min 30 s left" in file.getvalue()
    progress, file = _terminal()
    with progress:
        progress.workers(WorkerCounts(wanted=1, running=1, starting=0, pending=0, draining=0))
    assert "workers: 1 wanted, 1 running" in file.getvalue()
