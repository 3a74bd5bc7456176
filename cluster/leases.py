"""Who works on which prompt until when: every issued trajectory is accounted for until it is trained or given up.

A lease covers one prompt group. It stays open until its batch is in the experience log. A lease whose actor died
is issued again under the same trajectory ids; one that outlived its deadline is closed as expired and its prompt
is issued again under new ids. Always: issued = trained + quarantined + expired + dropped + open.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from contracts.records import Prompt
from learner.experience_queue import ScoredGroup, StalenessBound, group_id


@dataclass(frozen=True)
class Lease:
    """One prompt group in the hands of one rollout actor; its requests carry the deadline (`deadlines.lease_s`)."""

    group_id: str
    prompt: Prompt
    num_samples: int
    started_version: int
    actor_id: str
    attempt: int = 1

    @property
    def trajectory_ids(self) -> tuple[str, ...]:
        return tuple(f"{self.group_id}-{sample}" for sample in range(self.num_samples))


@dataclass
class LeaseCounts:
    """Trajectories by fate. `open` follows from the others."""

    issued: int = 0
    trained: int = 0
    quarantined: int = 0
    expired: int = 0
    dropped: int = 0

    @property
    def open(self) -> int:
        return self.issued - self.trained - self.quarantined - self.expired - self.dropped


@dataclass
class LeaseBook:
    """Open leases and counts. Deciding only: no waiting and no Ray in here.

    Counts by version are kept up to date with every change, so that a decision costs O(versions in flight).
    """

    bound: StalenessBound
    num_samples: int
    next_group: int = 0
    counts: LeaseCounts = field(default_factory=LeaseCounts)
    _running: OrderedDict[str, Lease] = field(default_factory=OrderedDict)  # in order of issue
    _queued: dict[str, int] = field(default_factory=dict)  # group id -> version it started at
    _quarantined: Counter[str] = field(default_factory=Counter)
    _running_at: Counter[int] = field(default_factory=Counter)  # groups by the version they started at
    _started_at: Counter[int] = field(default_factory=Counter)  # the same, with those that are queued

    def running(self) -> Counter[int]:
        """Groups not yet in the queue, by the version they started at."""
        return self._running_at.copy()

    def started(self) -> Counter[int]:
        """Groups not trained yet, by the version they started at."""
        return self._started_at.copy()

    @property
    def oldest_running(self) -> int:
        """The number of the oldest running group; where none runs, of the next one to be issued."""
        return int(next(iter(self._running))[1:]) if self._running else self.next_group

    @property
    def open_groups(self) -> int:
        """Groups running or queued."""
        return len(self._running) + len(self._queued)

    def may_start(self, version: int, *, training_version: int) -> bool:
        """Whether one more group may start at `version` without ever breaking the staleness bound."""
        return self.bound.room(self._started_at, version=version, training_version=training_version) >= 1

    def oldest_start(self, *, training_version: int) -> int:
        """The oldest version at which `may_start` is true; it is true at every newer one."""
        return self.bound.oldest_start(self._started_at, training_version=training_version)

    def issue(self, prompt: Prompt, *, version: int, actor_id: str) -> Lease:
        lease = Lease(group_id(self.next_group), prompt, self.num_samples, version, actor_id)
        self.next_group += 1
        self._running[lease.group_id] = lease
        self._running_at[version] += 1
        self._started_at[version] += 1
        self.counts.issued += lease.num_samples
        return lease

    def reissue(self, lease: Lease, *, version: int, actor_id: str) -> Lease:
        """The same trajectories on another actor, because the first one died.

        The group stays as old as it was: samples that had come back before are kept.

        Raises:
            ValueError: `version` is older than the one the group was admitted for.
        """
        if version < lease.started_version:
            raise ValueError(
                f"{lease.group_id}: issued again at version {version}, allowed are {lease.started_version} and later"
            )
        again = replace(lease, actor_id=actor_id, attempt=lease.attempt + 1)
        self._running[lease.group_id] = again
        return again

    def expire(self, lease: Lease) -> None:
        """Give an overdue group up; its prompt is issued again as a new group."""
        self._end(lease)
        self.counts.expired += lease.num_samples - self._quarantined.pop(lease.group_id, 0)

    def drop(self, lease: Lease) -> None:
        """A whole group teaches nothing; another prompt takes its place."""
        self._end(lease)
        self.counts.dropped += lease.num_samples - self._quarantined.pop(lease.group_id, 0)

    def quarantine(self, lease: Lease) -> None:
        """One trajectory of the group is bad. The lease of a group without a good one ends."""
        self.counts.quarantined += 1
        self._quarantined[lease.group_id] += 1
        if self._quarantined[lease.group_id] == lease.num_samples:
            self._end(lease)
            del self._quarantined[lease.group_id]

    def queued(self, lease: Lease) -> None:
        del self._running[lease.group_id]
        _subtract(self._running_at, lease.started_version)
        self._queued[lease.group_id] = lease.started_version

    def trained(self, batch: Iterable[ScoredGroup]) -> None:
        """The batch is in the experience log: its leases end."""
        for group in batch:
            _subtract(self._started_at, self._queued.pop(group.group_id))
            self._quarantined.pop(group.group_id, None)
            self.counts.trained += len(group.samples)

    @property
    def open_prompts(self) -> list[Prompt]:
        """Prompts of running leases, oldest first: what a resumed run issues first."""
        return [lease.prompt for lease in self._running.values()]

    def state(self) -> dict[str, Any]:
        """For the checkpoint. Running leases are not in it: they are issued again, under new ids."""
        running = sum(lease.num_samples - self._quarantined[group] for group, lease in self._running.items())
        counts = asdict(self.counts) | {"expired": self.counts.expired + running}
        return {"next_group": self.next_group, "counts": counts}

    def restore(self, state: dict[str, Any], queued: Iterable[ScoredGroup]) -> None:
        self.next_group = state["next_group"]
        self.counts = LeaseCounts(**state["counts"])
        self._queued = {group.group_id: group.started_version for group in queued}
        self._started_at = Counter(self._queued.values())

    def _end(self, lease: Lease) -> None:
        """It is given up while it runs."""
        del self._running[lease.group_id]
        _subtract(self._running_at, lease.started_version)
        _subtract(self._started_at, lease.started_version)


def _subtract(groups_at: Counter[int], version: int) -> None:
    """One group less at `version`. Empty entries go: versions are without end."""
    groups_at[version] -= 1
    if not groups_at[version]:
        del groups_at[version]
