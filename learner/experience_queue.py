"""The bounded queue between scoring and learning, and the rule that keeps its content fresh.

Versions: a batch trains at version n (step n + 1) and may hold responses that started at version n - S or
later, S = `max_lag_steps`. Groups that started at version <= w can only be consumed by the batches that train
at n .. w + S, so at most (w + S - n + 1) * groups_per_batch of them may be unconsumed before batch n is chosen.
Keeping that for every w keeps the bound strictly: no response is ever too old, and none has to be thrown away
unless it is still running when its last batch is due.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from contracts.records import ScoredRollout


@dataclass(frozen=True)
class StalenessBound:
    """`max_lag_steps` S and the number of prompt groups in a batch."""

    max_lag_steps: int
    groups_per_batch: int

    def room(self, started: Mapping[int, int], *, version: int, training_version: int) -> int:
        """How many groups may still start at `version` while batch `training_version` is not chosen yet.

        Args:
            started: unconsumed groups (queued and running) by the version they started at.
            version: version that the engine samples with.
            training_version: n, the version at which the next batch will train.
        """
        newest = max([version, *started])
        return min(
            self._allowed(until, training_version) - _count(started, until) for until in range(version, newest + 1)
        )

    def holds_after(self, started: Mapping[int, int], *, training_version: int) -> bool:
        """Whether what is left (`started`) can still be consumed in time once batch `training_version` is chosen."""
        return all(_count(started, until) <= self._allowed(until, training_version + 1) for until in started)

    def _allowed(self, until: int, training_version: int) -> int:
        return max(0, until + self.max_lag_steps - training_version + 1) * self.groups_per_batch


def _count(started: Mapping[int, int], until: int) -> int:
    return sum(groups for version, groups in started.items() if version <= until)


@dataclass(frozen=True)
class ScoredGroup:
    """The scored responses to one prompt; `started_version` bounds the age of all their tokens from below."""

    group_id: str
    started_version: int
    samples: tuple[ScoredRollout, ...]
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"group {self.group_id}: no samples")
        object.__setattr__(self, "num_bytes", sum(sample.num_bytes for sample in self.samples))


class ExperienceQueue:
    """Scored groups wait here for the learner, bounded in samples and bytes.

    `put` waits while the queue is full: that is the back-pressure; `remove` unblocks it. While the learner finds
    no batch it may take, a group is let in over the bound (it may be the straggler that the staleness bound makes
    the learner wait for), so that the two never wait for each other.
    An id that was ever accepted is refused (`put` returns False): nothing counts twice.
    """

    def __init__(self, bound: StalenessBound, *, max_samples: int, max_bytes: int) -> None:
        self._bound = bound
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._groups: dict[str, ScoredGroup] = {}
        self._accepted: set[str] = set()
        self._changed = asyncio.Condition()
        self._learner_waits = False
        self._changes = 0
        self._seen = 0
        self.blocked_s = 0.0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def num_samples(self) -> int:
        return sum(len(group.samples) for group in self._groups.values())

    @property
    def num_bytes(self) -> int:
        return sum(group.num_bytes for group in self._groups.values())

    @property
    def groups(self) -> tuple[ScoredGroup, ...]:
        return tuple(self._groups.values())

    def started(self) -> Counter[int]:
        """Queued groups by the version they started at."""
        return Counter(group.started_version for group in self._groups.values())

    async def put(self, group: ScoredGroup) -> bool:
        """Wait for room, then store. False if this group was accepted before."""
        async with self._changed:
            begun = asyncio.get_running_loop().time()
            await self._changed.wait_for(lambda: self._fits(group))
            self.blocked_s += asyncio.get_running_loop().time() - begun
            if group.group_id in self._accepted:
                return False
            self._accepted.add(group.group_id)
            self._groups[group.group_id] = group
            self._changes += 1
            self._changed.notify_all()
            return True

    def restore(self, groups: Iterable[ScoredGroup]) -> None:
        """Store a checkpoint's groups, over the bound too: nobody takes any out before the run goes on."""
        for group in groups:
            self._accepted.add(group.group_id)
            self._groups[group.group_id] = group

    async def notify(self) -> None:
        """Something that decides whether a batch may be taken has changed outside the queue."""
        async with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def ready(self, running: Mapping[int, int], *, training_version: int) -> list[ScoredGroup] | None:
        """The batch to train at `training_version`, oldest start first, or None while it must wait.

        `running` are the groups not yet in the queue, by the version they started at.
        """
        self._seen = self._changes
        oldest_first = sorted(self._groups.values(), key=lambda group: group.started_version)
        batch = oldest_first[: self._bound.groups_per_batch]
        if len(batch) < self._bound.groups_per_batch:
            return None
        left = self.started() + Counter(running)
        left -= Counter(group.started_version for group in batch)
        return batch if self._bound.holds_after(left, training_version=training_version) else None

    async def wait_changed(self, timeout_s: float) -> None:
        """Wait until something was put or notified since the last `ready`, at most `timeout_s`."""
        async with self._changed:
            self._learner_waits = True
            self._changed.notify_all()
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._changes != self._seen), timeout_s)
            except TimeoutError:
                return

    async def remove(self, batch: Iterable[ScoredGroup]) -> None:
        """Take a batch out and unblock producers."""
        async with self._changed:
            for group in batch:
                del self._groups[group.group_id]
            self._learner_waits = False
            self._changed.notify_all()

    def _fits(self, group: ScoredGroup) -> bool:
        if not self._groups or self._learner_waits:
            return True
        return (
            self.num_samples + len(group.samples) <= self._max_samples
            and self.num_bytes + group.num_bytes <= self._max_bytes
        )
