"""The version keeper: it holds the weights of published versions, and tells each replica which one to serve and when.

`version_table` decides which, `turns` decides when, `archive` has the weights; here is what connects them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from contracts.clock import now
from contracts.events import Event, EventKind, first_line
from contracts.json_lines import JsonLines
from contracts.records import SCHEMA_VERSION, WeightsUpdate
from contracts.serving import ServingConfig
from contracts.waiting import NoAnswer, answer
from models.adapters import adapter_shapes, skeleton
from models.engine_adapters import initial_adapter
from models.engine_shadow import policy_tensors
from serving.archive import Archive, Damaged, Entry, NeedsKeyframe, Unreachable
from serving.ending import ending
from serving.records import LIVE, Order, StartWeights, Step, Verdict, VersionRow
from serving.turns import Turns
from serving.version_table import VersionTable

_FETCH_S = 120.0  # training hands over the frames of a version
_TAKE_S = 180.0  # a replica decodes and exchanges weights, after it has drained
_GATE_S = 1800.0  # the gate judges a version
_GATE_PAUSE_S, _LONGEST_GATE_PAUSE_S = 10.0, 300.0  # after it failed, and after it failed often
_LOOK_S = 2.0
_REFS_S = 60.0  # how long frames stay in the object store after the last order with them


class VersionKeeper:
    """Exactly one replica of this deployment runs; its state is on disk, so that a restarted one goes on.

    It consumes what training publishes, what replicas report and what people ask for. Replicas wait in `order`, until
    another version is theirs to serve and it is their turn, for as long as they say. It waits for the gate alone,
    with a deadline.

    Args:
        config: of the application.
        folder: `output_dir/serving`, for the history, the events and the archive of weights.
        start: what replicas load when they start.
        key: signs the frames, see `serving.archive.weights_key`.
        gate: the deployment that judges versions (`holds`, `judge`), where `serving.gate` is set.

    Raises:
        ValueError: `serving.gate` is set and there is none.
    """

    def __init__(
        self,
        config: ServingConfig,
        folder: Path,
        start: StartWeights,
        *,
        key: bytes | None = None,
        gate: DeploymentHandle | None = None,
    ) -> None:
        if config.gate is not None and gate is None:
            raise ValueError("serving.gate is set and no gate runs: nothing may be served that it has not judged")
        self._config, self._start, self._gate = config, start, gate
        self._archive = Archive(
            folder / "weights",
            keyframe_every=config.keyframe_every,
            start=(start.version, lambda: start_tensors(start).items()),
            key=key,
            adapters=start.adapters is not None,
        )
        self._history_file = JsonLines(folder / "history.jsonl", synced=True)
        self._events = JsonLines(folder / "events.jsonl", synced=False)
        self._rows = _rows(folder / "history.jsonl")
        self._table = VersionTable(config.follow, start.version, start.path, self._rows, gated=gate is not None)
        self._turns = Turns()
        self._changing = asyncio.Lock()  # of archive and table
        self._changed = asyncio.Event()  # set and replaced whenever somebody's order may have changed
        self._refs: dict[Path, tuple[list[ray.ObjectRef], float]] = {}
        self._judging: asyncio.Task[None] | None = None
        self._letting_go: asyncio.Task[None] | None = None
        self._problems: dict[str, str] = {}  # by what has one: slots and the gate
        for reason in self._archive.set_aside:
            self._event("lost", "the archive of weights", reason, "training is asked for complete weights")
        known = {row.version for row in self._rows if row.status == "published"} | {start.version}
        for version in self._archive.versions:
            if version not in known:  # killed between the weights and the history, or the history is gone
                self._apply(self._table.published(version, time.time()))
        self._apply(self._table.started({*self._archive.versions, start.version}, time.time()))

    async def publish(self, update: WeightsUpdate, frames: list[ray.ObjectRef]) -> bool:
        """Take a version that training has made; True: a keyframe is wanted, of this version or the next.

        The frames are written to disk before this answers, because their owner, a trainer, may die at any moment.

        Raises:
            DiskFull: there was no room for them. Nothing of the version is kept.
            ValueError: it is damaged, signed by somebody else, or from another run. Nothing is kept.
        """
        asked = f"hand over version {update.version}"
        fetched = await answer(asyncio.gather(*frames), who="training", asked=asked, deadline_s=_FETCH_S)
        async with self._changing:
            try:
                await asyncio.to_thread(self._archive.add, update, fetched)
            except NeedsKeyframe as error:
                self._event("refusal", "the archive of weights", str(error), "asks for a keyframe")
                return True
            self._apply(self._table.published(update.version, time.time()))
            await asyncio.to_thread(self._drop)
        self._notify()
        return self._archive.wants_keyframe

    async def order(
        self, slot: str, replica: str, version: int | None, running: int, wait_s: float, *, starting: bool = False
    ) -> Order | None:
        """What the replica should serve next, as soon as it is its turn; None after `wait_s`.

        Args:
            slot: `live` or `pinned-VERSION`.
            version: what it serves; None if it serves no whole version, then the order begins with a keyframe.
            running: requests that it works on.
            starting: it serves nobody yet, and so takes nobody's turn. With `wait_s` 0, None says that `version` is
                the one to begin with, or that there is nothing better.
        """
        expires = now() + wait_s
        self._judge_candidate()  # one that waits since before this process
        if self._config.replicas.scales and (self._letting_go is None or self._letting_go.done()):
            self._letting_go = asyncio.ensure_future(self._let_go())
        while True:
            left_s, changed = max(0.0, expires - now()), self._changed
            self._turns.polled(slot, replica, version, running, now(), left_s, starting=starting)
            if version != self._wanted(slot) and self._turns.may_change(slot, replica, now()):
                order = await self._order(slot, replica, version)
                if order is not None:
                    return order
            if not left_s:
                return None
            wait = min(left_s, self._turns.next_change_s(now()))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await changed.wait()

    async def at_work(self, slot: str, replica: str) -> None:
        """The replica has its order and works on it. One that has died does not say so, and another has its turn."""
        self._turns.at_work(slot, replica, now())

    async def served(self, slot: str, replica: str, version: int | None, error: str = "") -> None:
        """The outcome of an order: what is served now. With an `error` the next order begins with a keyframe."""
        self._turns.changed(slot, replica, version, error, now())
        if error:
            self._event("refusal", replica, error, "is sent a keyframe")
        else:
            self._event("rollover", replica, f"slot {slot}", f"serves version {version}")
        self._notify()

    async def leave(self, slot: str, replica: str) -> None:
        """The replica shuts down and takes no turns any more."""
        if self._turns.leaves(slot, replica):
            self._notify()

    async def status(self) -> dict[str, Any]:
        """What is served and by whom; docs/serving.md says what the fields are."""
        table = self._table
        return {
            "current": table.current,
            "follow": table.follow,
            "held": table.held,
            "newest": table.newest,
            "candidate": table.candidate,
            "versions": self._available(),
            "weights_bytes": self._archive.num_bytes,
            "problems": list(self._problems.values()),
            "replicas": self._turns.status(now()),
        }

    async def history(self) -> list[VersionRow]:
        """What became of each version, oldest first."""
        return list(self._rows)

    async def pin(self, target: str) -> dict[str, Any]:
        """Serve version `target` until further notice, or follow training again with "latest"; answers as `status`.

        Raises:
            ValueError: it is no version, or its weights are not here.
        """
        async with self._changing:
            rows = self._table.pin(target, self._available(), time.time())
            await self._leave_current(rows)
        return await self.status()

    async def rollback(self, version: int) -> dict[str, Any]:
        """Go back to `version` and stay there until `pin("latest")`; answers as `status`.

        Raises:
            ValueError: its weights are not here, or it is not older than the current one.
        """
        async with self._changing:
            rows = self._table.rollback(version, self._available(), time.time())
            await self._leave_current(rows)
        return await self.status()

    async def _leave_current(self, rows: Sequence[VersionRow]) -> None:
        if self._table.current == self._start.version and rows[-1].version != self._start.version:
            await asyncio.to_thread(self._archive.keep_start)  # a way back
        self._apply(rows)
        self._notify()

    def _available(self) -> list[int]:
        return self._archive.versions or [self._start.version]

    def _wanted(self, slot: str) -> int:
        return self._table.current if slot == LIVE else int(slot.removeprefix("pinned-"))

    async def _order(self, slot: str, replica: str, version: int | None) -> Order | None:
        """The replica's order; None where no way leads to the wanted version, which `status` tells then."""
        wanted, deadline_s = self._wanted(slot), self._config.drain_s + _TAKE_S
        self._turns.changes(slot, replica, now(), deadline_s)
        held = None if self._turns.refused(slot, replica) else version
        try:
            steps = await self._steps(wanted, held)
        except (Unreachable, OSError) as error:
            self._problems[slot] = f"version {wanted} cannot be served: {error}"
            self._turns.changed(slot, replica, version, "", now())
            return None
        self._problems.pop(slot, None)
        self._turns.at_work(slot, replica, now())
        return Order(wanted, steps, deadline_s, alone=self._turns.alone(slot, replica))

    async def _steps(self, version: int, held: int | None) -> list[Step]:
        """What leads there, in the object store.

        Raises:
            Unreachable: nothing does.
        """
        async with self._changing:
            while True:
                way = self._archive.way(version, held=held)
                try:
                    return [(entry.update, await asyncio.to_thread(self._in_store, entry)) for entry in way]
                except Damaged as error:
                    self._event("lost", "the archive of weights", str(error), "training is asked for complete weights")

    def _in_store(self, entry: Entry) -> list[ray.ObjectRef]:
        kept = self._refs.get(entry.path)
        refs = kept[0] if kept else [ray.put(frame) for frame in self._archive.read(entry)[1]]
        self._refs = {path: each for path, each in self._refs.items() if time.monotonic() - each[1] < _REFS_S}
        self._refs[entry.path] = refs, time.monotonic()
        return refs

    def _drop(self) -> None:
        """Old weights, but for those that somebody may want at any time."""
        self._archive.drop_all_but(self._config.keep_versions, {*self._config.pinned, *self._table.needed})

    def _apply(self, rows: Iterable[VersionRow]) -> None:
        """On disk first: what counts is what a restarted keeper will read."""
        for row in rows:
            self._history_file.append({"schema_version": SCHEMA_VERSION} | asdict(row))
            self._rows.append(row)
            self._table.apply(row)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._judge_candidate()

    async def _let_go(self) -> None:
        """Replicas that Serve takes away finish their answers first: the others do not wait for that. Never ends."""
        while True:
            with suppress(NoAnswer, RayError, RayServeException):  # Serve's controller starts again, and knows then
                for replica in await ending(self._config.application, LIVE):
                    await self.leave(LIVE, replica)
            await asyncio.sleep(_LOOK_S)

    def _judge_candidate(self) -> None:
        if self._table.candidate is not None and (self._judging is None or self._judging.done()):
            self._judging = asyncio.ensure_future(self._judge_all())

    async def _judge_all(self) -> None:
        """Show the gate the newest version until there is no newer one. A gate that fails promotes nothing."""
        pause_s = _GATE_PAUSE_S
        while (candidate := self._table.candidate) is not None:
            try:
                asked = f"judge version {candidate}"
                verdict = await answer(self._judge(candidate), who="the gate", asked=asked, deadline_s=_GATE_S)
            except (NoAnswer, RayActorError, RayTaskError, RayServeException, Unreachable, OSError) as error:
                consequence = f"version {self._table.current} stays, tried again in {pause_s:g} s"
                self._event("death", "the gate", first_line(error), consequence)
                self._problems["gate"] = f"the gate did not judge version {candidate}: {first_line(error)}"
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_GATE_PAUSE_S)
                continue
            pause_s = _GATE_PAUSE_S
            self._problems.pop("gate", None)
            async with self._changing:
                rows = self._table.judged(
                    candidate, time.time(), promote=verdict.promote, reason=verdict.reason, metrics=verdict.metrics
                )
                self._apply(rows)
            self._changed.set()
            self._changed = asyncio.Event()

    async def _judge(self, candidate: int) -> Verdict:
        assert self._gate is not None
        current = self._table.current
        holds, measured = await self._gate.holds.remote()
        to_current = [] if measured == current else await self._steps(current, holds)
        to_candidate = await self._steps(candidate, holds if measured == current else current)
        verdict: Verdict = await self._gate.judge.remote(current, to_current, candidate, to_candidate)
        return verdict

    def _event(self, kind: EventKind, who: str, cause: str, consequence: str) -> None:
        event = {"time": time.time()} | asdict(Event(kind, who, cause, consequence))
        self._events.keep({"schema_version": SCHEMA_VERSION} | event)


def start_tensors(start: StartWeights) -> dict[str, Tensor]:
    """The version that replicas load when they start, as it would have been published."""
    if start.adapters is None:
        return policy_tensors(start.path, start.dtype)
    return initial_adapter(start.adapters, adapter_shapes(skeleton(start.path), start.adapters.lora))


def _rows(path: Path) -> list[VersionRow]:
    """What is on disk; a line that a crash cut off is none."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line)
            found.pop("schema_version")
            rows.append(VersionRow(**found))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return rows
