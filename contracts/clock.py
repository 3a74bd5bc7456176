"""The run's clock, and busy time: wall seconds during which at least one thing was going on."""

import asyncio
import time
from types import TracebackType


def now() -> float:
    """Seconds on the clock of the running event loop, which a simulation sets; outside of one, `time.monotonic()`."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


class BusyClock:
    """Enter it once per thing that goes on; overlapping things count once.

    >>> clock = BusyClock()
    >>> with clock:
    ...     pass
    >>> clock.seconds() >= 0
    True
    """

    def __init__(self) -> None:
        self.active = 0
        self._seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> "BusyClock":
        if self.active == 0:
            self._since = now()
        self.active += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active -= 1
        if self.active == 0:
            self._seconds += now() - self._since

    def seconds(self) -> float:
        """Busy wall seconds so far, the current stretch included."""
        return self._seconds + (now() - self._since if self.active else 0.0)
