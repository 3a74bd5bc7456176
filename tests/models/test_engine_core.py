"""The watch over an engine core: real processes that compute, wait or are stopped; questions answered or not."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from models import engine_core
from models.engine_core import CoreWatch, computed_s


@pytest.fixture
def core() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes for ever, in a child of its own."""
    compute = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    process = subprocess.Popen([sys.executable, "-c", compute], start_new_session=True)
    yield process
    engine_core.psutil.Process(process.pid).children()[0].kill()
    process.kill()
    process.wait(10)


async def never() -> None:
    await asyncio.Event().wait()


async def look_for(watch: CoreWatch, seconds: float) -> None:
    expires = time.monotonic() + seconds
    while time.monotonic() < expires:
        watch.look()
        await asyncio.sleep(0.05)


def test_a_core_that_computes_is_not_idle_and_one_that_is_stopped_is(
    core: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_core, "_EVERY_S", 0.2)

    async def watch_both() -> tuple[float, float, float, float]:
        watch = CoreWatch(never, lambda: computed_s([core.pid]))
        await look_for(watch, 2.0)
        computing = watch.unanswered_s, watch.idle_s
        (worker,) = engine_core.psutil.Process(core.pid).children()
        worker.send_signal(signal.SIGSTOP)
        await look_for(watch, 1.5)
        return *computing, watch.unanswered_s, watch.idle_s

    unanswered_s, idle_s, later_unanswered_s, later_idle_s = asyncio.run(watch_both())
    assert unanswered_s > 1
    assert idle_s < 0.7  # others may take the cores for a moment
    assert later_unanswered_s > 2
    assert later_idle_s > 0.8


def test_a_core_that_answers_owes_nothing_and_is_asked_at_most_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_core, "_EVERY_S", 0.2)
    asked = 0

    async def quick() -> None:
        nonlocal asked
        asked += 1

    async def watch_one() -> CoreWatch:
        watch = CoreWatch(quick, lambda: 0.0)
        await look_for(watch, 1.0)
        return watch

    watch = asyncio.run(watch_one())
    assert (watch.unanswered_s, watch.idle_s) == (0, 0)
    assert 2 <= asked <= 6


def test_time_in_which_the_watch_itself_could_not_look_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_core, "_EVERY_S", 0.1)
    monkeypatch.setattr(engine_core, "_LONGEST_GAP_S", 0.2)

    async def sleep_long() -> CoreWatch:
        watch = CoreWatch(never, lambda: 0.0)
        for _ in range(3):
            watch.look()
            time.sleep(0.6)  # noqa: ASYNC251 as a process that is stopped
        return watch

    watch = asyncio.run(sleep_long())
    assert watch.unanswered_s == pytest.approx(0.4, abs=0.01)
    assert watch.idle_s == pytest.approx(0.2, abs=0.01)
