"""Waiting across processes: always with a deadline, and an error that names who did not answer."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from contracts.clock import now

T = TypeVar("T")


class NoAnswer(TimeoutError):
    """Another process did not answer in time."""


async def answer(awaitable: Awaitable[T], *, who: str, asked: str, deadline_s: float, node: str = "") -> T:
    """The result of `awaitable`, or NoAnswer after `deadline_s` seconds; the awaitable is cancelled then.

    `node` is the address of the machine that `who` runs on, where it is known. A TimeoutError of the awaitable's own
    is passed on as it is.
    """
    began = now()
    try:
        async with asyncio.timeout(deadline_s) as deadline:
            return await awaitable
    except TimeoutError as error:
        if not deadline.expired():
            raise
        # Not the deadline again: a process that was stopped, or a loop that was busy, waited for longer.
        where, since_s = f" on node {node}" if node else "", now() - began
        message = f"{who}{where} did not answer within {deadline_s:g} s, asked {since_s:.1f} s ago to {asked}"
        raise NoAnswer(message) from error
