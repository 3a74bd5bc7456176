"""The wish to stop, as the main loop sees it."""

import asyncio
from collections.abc import Callable


class StopRequest(asyncio.Event):
    """Set by the first signal. With `graceful` the run ends itself, with a checkpoint; without, it is cancelled.

    `on_signal` is told the name of every signal that comes, and what it leads to: `consequence`, where it is graceful.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graceful = False
        self.consequence = "ends after this step, with a checkpoint"
        self.on_signal: Callable[[str, str], None] = lambda name, consequence: None
