"""Commands that run until they are done, or a person or a machine says stop."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from contracts.stopping import StopRequest


def run_until_signal(
    start: Callable[[StopRequest], Coroutine[Any, Any, Any]],
) -> tuple[Any, int | None]:
    """Run a coroutine until it ends or SIGINT or SIGTERM comes.

    The first signal lets it end by itself where it has said that it can (`StopRequest.graceful`), and cancels it
    where not; a second one cancels it in any case. Returns its result (None if cancelled) and the first signal.
    """
    received: list[int] = []

    async def main() -> Any:
        stopping = StopRequest()
        task = asyncio.ensure_future(start(stopping))
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            ends_by_itself = stopping.graceful and not received
            consequence = stopping.consequence if ends_by_itself else "is cancelled"
            stopping.on_signal(signal.Signals(number).name, consequence)
            if not ends_by_itself:
                task.cancel()
            else:
                print("\nstopping: what runs is brought to an end first; again to stop at once", file=sys.stderr)
            received.append(number)
            stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        return await task

    try:
        result = asyncio.run(main())
    except asyncio.CancelledError:
        if not received:
            raise
        result = None
    return result, received[0] if received else None


def how_to_continue(output_dir: Path, config: Path, outcome: Any, *, command: str = "train") -> str:
    """What to do after a run was stopped."""
    if outcome is None and not (output_dir / "config.yaml").exists():
        return "stopped before anything was written; start again"
    if outcome is not None and outcome.finished:
        return f"training finished after step {outcome.step}; the policy is not served any more"
    where = f"after step {outcome.step}" if outcome is not None else "at once"
    return f"stopped {where}; continue with: headrace {command} {config} resume=true"
