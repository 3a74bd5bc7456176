"""Busy time: wall seconds during which at least one thing was going on."""

import time
from types import TracebackType


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
            self._since = time.monotonic()
        self.active += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.active -= 1
        if self.active == 0:
            self._seconds += time.monotonic() - self._since

    def seconds(self) -> float:
        """Busy wall seconds so far, the current stretch included."""
        return self._seconds + (time.monotonic() - self._since if self.active else 0.0)
