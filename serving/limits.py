"""How much a caller may ask for, and how much may wait: decisions only, the clock is passed in."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class TokenBucket:
    """`per_minute` flow in evenly, at most as many are kept: a caller may spend a minute's worth at once.

    >>> bucket = TokenBucket(per_minute=60, now_s=0.0)
    >>> bucket.take(60, now_s=0.0), bucket.take(2, now_s=0.0), bucket.take(2, now_s=2.0)
    (0.0, 2.0, 0.0)
    """

    per_minute: int
    now_s: float
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = float(self.per_minute)

    def take(self, amount: float, *, now_s: float) -> float:
        """Take `amount` and return 0, or take nothing and return after how many seconds it would be there.

        More than a full bucket takes a full one: it could never be had.
        """
        self._flow(now_s)
        missing = min(amount, self.per_minute) - self.level
        if missing > 0:
            return missing * 60 / self.per_minute
        self.level -= min(amount, self.per_minute)
        return 0.0

    def settle(self, reserved: float, used: float, *, now_s: float) -> None:
        """Give back what was reserved and not used. More used than reserved is a debt, up to a minute's worth."""
        self._flow(now_s)
        level = self.level + min(reserved, self.per_minute) - used
        self.level = max(-float(self.per_minute), min(level, float(self.per_minute)))

    def _flow(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self.now_s)
        self.level = min(float(self.per_minute), self.level + passed_s * self.per_minute / 60)
        self.now_s = max(now_s, self.now_s)


class Rates:
    """The buckets of one kind, one for each caller; without a rate everybody passes."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, caller: str, amount: float, *, now_s: float) -> float:
        """Seconds after which to ask again, 0 where the caller may go on."""
        if self._per_minute is None:
            return 0.0
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = TokenBucket(self._per_minute, now_s)
        return bucket.take(amount, now_s=now_s)

    def settle(self, caller: str, reserved: float, used: float, *, now_s: float) -> None:
        if caller in self._buckets:
            self._buckets[caller].settle(reserved, used, now_s=now_s)


class Admission:
    """Who may come in: those that find a place, and `max_waiting` more over all slots.

    >>> door = Admission(max_waiting=1)
    >>> door.set_places("live", 1)
    >>> door.enter("live"), door.enter("live"), door.enter("live")
    (True, True, False)
    >>> door.leave("live")
    >>> door.enter("live")
    True
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._places: dict[str, int] = {}
        self._inside: defaultdict[str, int] = defaultdict(int)

    def set_places(self, slot: str, places: int) -> None:
        """How many requests the replicas of the slot work on at once. Who is inside stays inside."""
        self._places[slot] = places

    def enter(self, slot: str) -> bool:
        finds_a_place = self._inside[slot] < self._places.get(slot, 0)
        if not finds_a_place and self.waiting >= self._max_waiting:
            return False
        self._inside[slot] += 1
        return True

    @property
    def full(self) -> bool:
        """Nobody would be let in, whichever slot they ask for."""
        return self.waiting >= self._max_waiting and all(
            self._inside[slot] >= places for slot, places in self._places.items()
        )

    def leave(self, slot: str) -> None:
        self._inside[slot] -= 1

    @property
    def inside(self) -> int:
        return sum(self._inside.values())

    @property
    def waiting(self) -> int:
        return sum(max(0, inside - self._places.get(slot, 0)) for slot, inside in self._inside.items())
