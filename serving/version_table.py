"""Which version is to be served: decided from the history alone.

Everything that happens is a row of the history first; the table is what the rows add up to, so that a restarted keeper
decides as the one before it would have.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from serving.records import VersionRow

_NUMBER = re.compile(r"\d{1,18}")


class VersionTable:
    """Rows in, rows out: whoever keeps the history writes what the methods return, and then calls `apply` with it.

    Without a gate a version that is followed is promoted as soon as it is published. With one, the newest that is
    followed is the `candidate` until it was judged. While a pin or a rollback holds, nothing is promoted.

    Args:
        follow: `latest`, `pinned:VERSION`, or `every:N` (each N-th published version).
        start: the version that replicas begin with, and where it comes from.
        rows: the history so far.
    """

    def __init__(
        self, follow: str, start: int, source: str, rows: Iterable[VersionRow] = (), *, gated: bool = False
    ) -> None:
        self._follow, self._start, self._source, self._gated = follow, start, source, gated
        self._published: dict[int, int] = {}  # version -> how many were published up to it
        self._judged: dict[int, bool] = {}  # version -> whether it was promoted
        self.current = start
        self.held = False  # by a pin or a rollback
        for row in rows:
            self.apply(row)

    @property
    def follow(self) -> str:
        """What it follows where nothing holds it."""
        return self._follow

    @property
    def newest(self) -> int | None:
        """The newest published version."""
        return max(self._published, default=None)

    @property
    def candidate(self) -> int | None:
        """The newest version that the gate should judge, None where there is nothing for it to do."""
        if not self._gated or self.held:
            return None
        newest = max((version for version in self._published if self._followed(version)), default=None)
        return newest if newest is not None and newest not in self._judged and newest != self.current else None

    @property
    def needed(self) -> set[int]:
        """Versions that may have to be served or judged without being published again."""
        return {self.current, max(self._allowed(), default=self.current), self.candidate or self.current}

    def apply(self, row: VersionRow) -> None:
        """What a row changes."""
        if row.status == "published":
            self._published[row.version] = len(self._published) + 1
        elif row.status == "refused":
            self._judged[row.version] = False
        elif row.status == "promoted":
            self.current = row.version
            self._judged[row.version] = True
        elif row.status == "released":
            self.held = False
            if self._follow.startswith("pinned:"):
                self._follow = "latest"
        else:
            self.current, self.held = row.version, True

    def started(self, available: Collection[int], time: float) -> list[VersionRow]:
        """The application starts, with what it begins with and the weights of what is `available`."""
        wanted = self._wanted()
        if not (self._published or self._judged or self.held):
            return [VersionRow(self._start, time, "promoted", f"the application started from {self._source}")]
        if wanted in available:
            return self._promoted(time, f"the application started from {self._source}")
        lost = f"the weights of version {wanted} are gone; {spoken(available)}"
        return [VersionRow(max(self._allowed() & {*available}, default=self._start), time, "promoted", lost)]

    def published(self, version: int, time: float) -> list[VersionRow]:
        """Training has made a version; nothing where that is known already."""
        if version in self._published:
            return []
        row = VersionRow(version, time, "published", "")
        return [row, *self._after([row])._promoted(time, f"follows {self._follow}")]

    def judged(
        self, version: int, time: float, *, promote: bool, reason: str, metrics: Mapping[str, float]
    ) -> list[VersionRow]:
        """The gate has decided. Where something was pinned meanwhile, or it was judged already, nothing happens."""
        if self.held or version in self._judged:
            return []
        return [VersionRow(version, time, "promoted" if promote else "refused", reason, dict(metrics))]

    def pin(self, target: str, available: Collection[int], time: float) -> list[VersionRow]:
        """Hold `target`, or with "latest" follow training again.

        Raises:
            ValueError: it is neither, or the weights are not `available`.
        """
        if target == "latest":
            row = VersionRow(self.current, time, "released", "asked to follow training again")
            return [row, *self._after([row])._promoted(time, "followed again")]
        if not _NUMBER.fullmatch(target):
            raise ValueError(f"{target!r} is no version: give a number, or latest")
        version = int(target)
        self._check(version, available)
        return [VersionRow(version, time, "pinned", "asked to stay at it")]

    def rollback(self, version: int, available: Collection[int], time: float) -> list[VersionRow]:
        """Go back to `version` and hold it.

        Raises:
            ValueError: it is not older than the current one, or its weights are not `available`.
        """
        if version >= self.current:
            raise ValueError(f"version {version} is not older than version {self.current}, which is served: pin it")
        self._check(version, available)
        return [VersionRow(version, time, "rolled_back", f"asked to go back from version {self.current}")]

    def _check(self, version: int, available: Collection[int]) -> None:
        if version not in available:
            raise ValueError(f"the weights of version {version} are not here; {spoken(available)}")

    def _after(self, rows: Iterable[VersionRow]) -> VersionTable:
        """The table as it will be."""
        after = VersionTable(self._follow, self._start, self._source, gated=self._gated)
        after._published, after._judged = dict(self._published), dict(self._judged)
        after.current, after.held = self.current, self.held
        for row in rows:
            after.apply(row)
        return after

    def _promoted(self, time: float, reason: str) -> list[VersionRow]:
        """The row that makes the wanted version the current one, where it is not."""
        wanted = self._wanted()
        return [VersionRow(wanted, time, "promoted", reason)] if wanted != self.current else []

    def _wanted(self) -> int:
        """Of what may be served, the newest: the gate's word counts, and what the application was started with."""
        return self.current if self.held else max(self._allowed(), default=self.current)

    def _allowed(self) -> set[int]:
        pinned = self._follow.startswith("pinned:")
        if self._gated and not pinned:
            allowed = {version for version, promoted in self._judged.items() if promoted}
        else:
            allowed = {*self._published}
        if self._judged.get(self._start, True):
            allowed.add(self._start)
        return {version for version in allowed if self._followed(version) or (version == self._start and not pinned)}

    def _followed(self, version: int) -> bool:
        kind, _, number = self._follow.partition(":")
        if kind == "pinned":
            return version == int(number)
        return kind == "latest" or (version in self._published and self._published[version] % int(number) == 0)


def spoken(versions: Collection[int]) -> str:
    """Which there are, in words.

    >>> spoken([3, 4, 5, 9])
    'there are 3 to 5, 9'
    """
    runs: list[list[int]] = []
    for version in sorted(versions):
        if runs and version == runs[-1][-1] + 1:
            runs[-1].append(version)
        else:
            runs.append([version])
    said = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"there are {said}" if said else "there is none"
