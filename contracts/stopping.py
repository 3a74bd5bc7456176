"""The wish to stop, as the main loop sees it."""

import asyncio
from collections.abc import Callable


class StopRequest(asyncio.Event):
    """Set by the first signal. With `graceful` the run ends itself, with a checkpoint; without, it is cancelled.

    `on_signal` is told the name of every signal that comes, and what it leads to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graceful = False
        self.on_signal: Callable[[str, str], None] = lambda name, consequence: None
