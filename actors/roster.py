"""Who has room: the ready workers of a pool by the version they serve and by their load. No Ray, no waiting."""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

from contracts.clock import now


class Loaded(Protocol):
    """A worker: the weights version that it serves."""

    version: int


class Used(NamedTuple):
    """Seconds since the beginning, summed: of ready workers, and of their places that were taken."""

    worker_s: float
    place_s: float


class WorkerCounts(NamedTuple):
    """The workers of a pool by their state. `pending` ones have no node yet, of those that are `starting`."""

    wanted: int
    running: int
    starting: int
    pending: int
    draining: int


W = TypeVar("W", bound=Loaded)


class Roster(Generic[W]):
    """The ready workers, with `max_load` places each. Every operation is O(versions + places), not O(workers).

    Places are taken when a request is decided on, not when it arrives: several groups are issued in one turn of the
    event loop, and they must not all go to the worker that was least loaded before it.
    """

    def __init__(self, max_load: int) -> None:
        self._max_load = max_load
        self._places: dict[W, tuple[int, int]] = {}  # worker -> (version, load)
        self._workers: dict[int, dict[int, dict[W, None]]] = {}  # version -> load -> workers, in order of arrival
        self._taken = 0  # places, of each worker no more than it has
        self._used, self._used_at = Used(0.0, 0.0), now()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def workers(self) -> tuple[W, ...]:
        """In order of arrival."""
        return tuple(self._places)

    def __contains__(self, worker: object) -> bool:
        return worker in self._places

    def load(self, worker: W) -> int:
        """Places taken at a worker; 0 for one that left."""
        return self._places.get(worker, (0, 0))[1]

    def used(self) -> Used:
        """Up to now."""
        self._count_time()
        return self._used

    def add(self, worker: W) -> None:
        self._put(worker, worker.version, 0)

    def remove(self, worker: W) -> None:
        """It gets no more requests; requests that it still holds are released to nobody."""
        self._take_out(worker)
        del self._places[worker]

    def reserve(self, num_requests: int, *, oldest_version: int = 0) -> W | None:
        """Take places at the least loaded worker that serves `oldest_version` or newer; None where none has room.

        A worker has room while it is not full. The last group may exceed its places by less than a group: the engine
        holds those requests back, and no place of it lies idle until a whole group fits.
        """
        best: tuple[int, int] | None = None
        for version, loads in self._workers.items():
            if version >= oldest_version:
                least = (min(loads), -version)
                if best is None or least < best:
                    best = least
        if best is None or best[0] >= self._max_load:
            return None
        load, version = best[0], -best[1]
        worker = next(iter(self._workers[version][load]))
        self._move(worker, version, load + num_requests)
        return worker

    def release(self, worker: W) -> None:
        """One of its requests has ended."""
        if worker in self._places:
            version, load = self._places[worker]
            self._move(worker, version, load - 1)

    def updated(self, worker: W) -> None:
        """It serves another version now."""
        if worker in self._places:
            self._move(worker, worker.version, self._places[worker][1])

    def _move(self, worker: W, version: int, load: int) -> None:
        self._take_out(worker)
        self._put(worker, version, load)

    def _count_time(self) -> None:
        at = now()
        passed_s, self._used_at = at - self._used_at, at
        worker_s, place_s = self._used
        self._used = Used(worker_s + passed_s * len(self._places), place_s + passed_s * self._taken)

    def _put(self, worker: W, version: int, load: int) -> None:
        self._count_time()
        self._taken += min(load, self._max_load)
        self._places[worker] = (version, load)
        self._workers.setdefault(version, {}).setdefault(load, {})[worker] = None

    def _take_out(self, worker: W) -> None:
        self._count_time()
        version, load = self._places[worker]
        self._taken -= min(load, self._max_load)
        loads = self._workers[version]
        del loads[load][worker]
        if not loads[load]:
            del loads[load]
        if not loads:
            del self._workers[version]
