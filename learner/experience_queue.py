"""The bounded queue between scoring and learning, and the rule that keeps its content fresh.

Versions: a batch trains at version n (step n + 1) and may hold responses that started at version n - S or
later, S = `max_lag_steps`. Groups that started at version <= w can only be consumed by the batches that train
at n .. w + S, so at most (w + S - n + 1) * groups_per_batch of them may be unconsumed before batch n is chosen.
Keeping that for every w keeps the bound strictly: no response is ever too old, and none has to be thrown away
unless it is still running when its last batch is due.

With `stale_tokens: mask` admission is the same, but a batch does not wait for what is still running: a response
that comes later trains later, and the learner leaves those of its tokens out that are older than S.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from contracts.records import ScoredRollout


@dataclass(frozen=True)
class StalenessBound:
    """`max_lag_steps` S, the number of prompt groups in a batch, and what becomes of tokens older than S."""

    max_lag_steps: int
    groups_per_batch: int
    stale_tokens: Literal["expire", "mask"] = "expire"

    def room(self, started: Mapping[int, int], *, version: int, training_version: int) -> int:
        """How many groups may still start at `version` while batch `training_version` is not chosen yet.

        Args:
            started: unconsumed groups (queued and running) by the version they started at.
            version: version that the engine samples with.
            training_version: n, the version at which the next batch will train.
        """
        unconsumed = sum(groups for start, groups in started.items() if start <= version)
        room = self._allowed(version, training_version) - unconsumed
        # Between two starts only the places grow, so it is enough to look at the starts.
        for start in sorted(start for start in started if start > version):
            unconsumed += started[start]
            room = min(room, self._allowed(start, training_version) - unconsumed)
        return room

    def oldest_start(self, started: Mapping[int, int], *, training_version: int) -> int:
        """The oldest version at which one more group may start; newer ones have at least as much room."""
        version = max([training_version, *started])
        while self.room(started, version=version, training_version=training_version) < 1:
            version += 1
        while version > 0 and self.room(started, version=version - 1, training_version=training_version) >= 1:
            version -= 1
        return version

    def holds_after(self, started: Mapping[int, int], *, training_version: int) -> bool:
        """Whether what is left (`started`) can still be consumed in time once batch `training_version` is chosen."""
        if self.stale_tokens == "mask":
            return True
        unconsumed = 0
        for start in sorted(started):
            unconsumed += started[start]
            if unconsumed > self._allowed(start, training_version + 1):
                return False
        return True

    def _allowed(self, until: int, training_version: int) -> int:
        return max(0, until + self.max_lag_steps - training_version + 1) * self.groups_per_batch


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


def group_id(number: int) -> str:
    """The id of the `number`-th group that a run issues."""
    return f"g{number:08d}"


class ExperienceQueue:
    """Scored groups wait here for the learner, bounded in samples and bytes.

    `put` waits while the queue is full, first come first served: that is the back-pressure; `remove` unblocks it.
    While the learner finds no batch it may take, every group is let in over the bound (one may be the straggler that
    the staleness bound makes the learner wait for), so that the two never wait for each other.
    An id that was ever accepted is refused (`put` returns False): nothing counts twice. Ids are numbered in the order
    of issue, and `settle` says below which all have met their fate, so that only those above are remembered.
    """

    def __init__(self, bound: StalenessBound, *, max_samples: int, max_bytes: int) -> None:
        self._bound = bound
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._groups: dict[str, ScoredGroup] = {}
        self._by_start: dict[int, dict[str, ScoredGroup]] = {}  # in order of arrival
        self._accepted: set[int] = set()  # numbers from `_settled` on
        self._settled = 0
        self._blocked: deque[tuple[ScoredGroup, asyncio.Future[None]]] = deque()
        self._learner: asyncio.Future[None] | None = None  # set while the learner sleeps
        self._learner_waits = False
        self._changed = False  # since the learner last looked
        self.num_samples = 0  # these two with the groups that were let in and have yet to wake up
        self.num_bytes = 0
        self.blocked_s = 0.0

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def groups(self) -> tuple[ScoredGroup, ...]:
        return tuple(self._groups.values())

    def started(self) -> Counter[int]:
        """Queued groups by the version they started at."""
        return Counter({version: len(groups) for version, groups in self._by_start.items()})

    async def put(self, group: ScoredGroup) -> bool:
        """Wait for room, then store. False if this group was accepted before."""
        if self._blocked or not self._fits(group):
            begun = asyncio.get_running_loop().time()
            await self._wait_for_room(group)
            self.blocked_s += asyncio.get_running_loop().time() - begun
        else:
            self._take_room(group)
        if not self._accept(group):
            self._give_room_back(group)
            return False
        self._store(group)
        self._wake_learner()
        return True

    def replace(self, group: ScoredGroup) -> bool:
        """Put a group's new scores in its old place. False if it is not queued any more."""
        old = self._groups.get(group.group_id)
        if old is None:
            return False
        self._groups[group.group_id] = self._by_start[old.started_version][group.group_id] = group
        self.num_bytes += group.num_bytes - old.num_bytes
        return True

    def restore(self, groups: Iterable[ScoredGroup]) -> None:
        """Store a checkpoint's groups, over the bound too: nobody takes any out before the run goes on."""
        for group in groups:
            if self._accept(group):
                self._take_room(group)
                self._store(group)

    def settle(self, below: int) -> None:
        """No group with a lower number than `below` is still out: forget which of them were accepted, refuse all."""
        while self._settled < below:
            self._accepted.discard(self._settled)
            self._settled += 1

    def notify(self) -> None:
        """Something that decides whether a batch may be taken has changed outside the queue."""
        if len(self._groups) >= self._bound.groups_per_batch:  # a batch that lacks groups waits for a `put`
            self._wake_learner()

    def ready(self, running: Mapping[int, int], *, training_version: int) -> list[ScoredGroup] | None:
        """The batch to train at `training_version`, oldest start first, or None while it must wait.

        `running` are the groups not yet in the queue, by the version they started at.
        """
        self._changed = False
        if len(self._groups) < self._bound.groups_per_batch:
            return None
        left = Counter(running)
        wanted = self._bound.groups_per_batch
        for start in sorted(self._by_start):
            left[start] += max(0, len(self._by_start[start]) - wanted)
            wanted = max(0, wanted - len(self._by_start[start]))
        if not self._bound.holds_after(left, training_version=training_version):
            return None
        oldest_first = (group for start in sorted(self._by_start) for group in self._by_start[start].values())
        return list(islice(oldest_first, self._bound.groups_per_batch))

    async def wait_changed(self, timeout_s: float) -> None:
        """Wait until something was put or notified since the last `ready`, at most `timeout_s`."""
        self._learner_waits = True
        self._let_in()
        if self._changed:
            return
        self._learner = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await self._learner
        except TimeoutError:
            return
        finally:
            self._learner = None

    async def remove(self, batch: Iterable[ScoredGroup]) -> None:
        """Take a batch out and unblock producers."""
        for group in batch:
            del self._groups[group.group_id]
            same_start = self._by_start[group.started_version]
            del same_start[group.group_id]
            if not same_start:
                del self._by_start[group.started_version]
            self._give_room_back(group)
        self._learner_waits = False
        self._let_in()

    def _accept(self, group: ScoredGroup) -> bool:
        number = int(group.group_id[1:])
        if number < self._settled or number in self._accepted:
            return False
        self._accepted.add(number)
        return True

    def _store(self, group: ScoredGroup) -> None:
        self._groups[group.group_id] = group
        self._by_start.setdefault(group.started_version, {})[group.group_id] = group

    def _wake_learner(self) -> None:
        self._changed = True
        if self._learner is not None and not self._learner.done():
            self._learner.set_result(None)

    async def _wait_for_room(self, group: ScoredGroup) -> None:
        """On return the group's room is taken. Cancelled, it leaves none behind."""
        let_in: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._blocked.append((group, let_in))
        try:
            await let_in
        except asyncio.CancelledError:
            if let_in.done() and not let_in.cancelled():
                self._give_room_back(group)
            else:
                self._blocked.remove((group, let_in))
            self._let_in()
            raise

    def _let_in(self) -> None:
        while self._blocked and self._fits(self._blocked[0][0]):
            group, let_in = self._blocked.popleft()
            self._take_room(group)
            let_in.set_result(None)

    def _take_room(self, group: ScoredGroup) -> None:
        self.num_samples += len(group.samples)
        self.num_bytes += group.num_bytes

    def _give_room_back(self, group: ScoredGroup) -> None:
        self.num_samples -= len(group.samples)
        self.num_bytes -= group.num_bytes

    def _fits(self, group: ScoredGroup) -> bool:
        if self.num_samples == 0 or self._learner_waits:
            return True
        return (
            self.num_samples + len(group.samples) <= self._max_samples
            and self.num_bytes + group.num_bytes <= self._max_bytes
        )
