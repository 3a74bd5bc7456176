"""Waiting across processes: always with a deadline, and an error that names who did not answer."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class NoAnswer(TimeoutError):
    """Another process did not answer in time."""


async def answer(awaitable: Awaitable[T], *, who: str, asked: str, deadline_s: float) -> T:
    """The result of `awaitable`, or NoAnswer after `deadline_s` seconds; the awaitable is cancelled then.

    A TimeoutError of the awaitable's own is passed on as it is.
    """
    try:
        async with asyncio.timeout(deadline_s) as deadline:
            return await awaitable
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise NoAnswer(f"{who} did not answer within {deadline_s:g} s, asked to {asked}") from error
