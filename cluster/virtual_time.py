"""An event loop in virtual time: hours pass as fast as they can be decided on."""

from __future__ import annotations

import asyncio
import selectors


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        selector = selectors.DefaultSelector()
        super().__init__(selector)
        self._now = 0.0
        poll = selector.select

        def jump(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is None:
                raise AssertionError("deadlock: nothing can go on and no timer is set")
            self._now += max(0.0, timeout)
            return poll(0)

        selector.select = jump  # type: ignore[method-assign]

    def time(self) -> float:
        return self._now
