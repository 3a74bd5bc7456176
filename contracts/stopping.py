"""The wish to stop, as the main loop sees it."""

import asyncio


class StopRequest(asyncio.Event):
    """Set by the first signal. With `graceful` the run ends itself, with a checkpoint; without, it is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.graceful = False
