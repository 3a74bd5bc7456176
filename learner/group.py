"""The learner as a group of Ray actors, one a rank: the driver's side.

Calls go to all ranks at once. The group watches them: one that dies, does not answer, or falls behind for longer than
`deadlines.rank_s` is named, all ranks are replaced, and they go on from the last checkpoint by training again on the
batches logged since, so that nothing is lost and no version changes its meaning.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from contracts.config import DeadlinesConfig
from contracts.disk import DiskFull
from contracts.events import Event, EventKind, first_line
from contracts.records import ScoredRollout, WeightsUpdate
from contracts.waiting import NoAnswer, answer
from contracts.workers import LearnerConfig
from learner.places import Missing, Places
from learner.publish import WeightsRefs
from learner.rank import LearnerRank, LearnerSettings, training_environment

_LOOK_AGAIN_S = 2.0
_MAX_REFORMS = 3  # in a row, without a call that succeeded
_PAUSE_S = 2.0  # before the second of them, four times as long before each further one
_MAX_SENDS = 3  # of what the object store has lost
_BLAME_S = 5.0  # beyond deadlines.rank_s: how long a survivor's error waits for the news of the rank that failed


class RankFailure(RuntimeError):
    """A rank, `who`, died, fell silent or was left behind: `what` happened while it was asked to do what."""

    def __init__(self, who: str, what: str, node: str, *, kind: EventKind = "death") -> None:
        where = f" on node {node}" if node else ""
        super().__init__(f"{who}{where} {what}")
        self.who, self.what, self.node, self.kind = who, what, node, kind


class BatchLost(RuntimeError):
    """The object store has lost what the ranks were to work on, and none of them has begun."""


class LearnerGroup:
    """The driver's side: calls go to all ranks, failures of ranks are repaired.

    Args:
        logged: the batch that step N trained on, from the experience log.
        on_change: told when a rank is lost, when the learner goes on, and when no node has room for it.
        missing: says what ranks that have no node wait for.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        workers: LearnerConfig,
        deadlines: DeadlinesConfig,
        *,
        logged: Callable[[int], list[ScoredRollout]],
        on_change: Callable[[Event], None],
        snapshot: Path | None = None,
        step: int = 0,
        missing: Missing | None = None,
    ) -> None:
        self._settings, self._workers, self._deadlines = settings, workers, deadlines
        self._logged, self._on_change = logged, on_change
        self._snapshot, self._snapshot_step = snapshot, step
        self._step = step  # trained so far
        self._published = step
        self._from_checkpoint = snapshot is not None  # what engines hold as the published version
        self._whole = asyncio.Event()  # rank 0 holds the published version
        self._places = Places(workers, deadlines, who="the learner", missing=missing or _asked_for)
        self._ranks: list[Any] = []
        self._nodes: list[tuple[str, str]] = []  # address and id of the ranks', as far as they have said

    async def ready(self) -> int:
        """Start the ranks and load the model on each; returns the number of parameters."""
        parameters = await self._start()
        await self._seed()
        self._on_change(Event("start", "the learner", "", f"holds version {self._published}", self._where(0)))
        return parameters

    async def step(self, batch: Sequence[ScoredRollout], *, training_version: int) -> dict[str, float]:
        # One copy in the object store, read by every rank.
        asked = f"train step {training_version + 1}"
        answers = await self._repairing("step", (list(batch), training_version), asked, self._deadlines.learn_s)
        self._step = training_version + 1
        metrics: dict[str, float] = answers[0]
        return metrics

    async def publish(self, version: int) -> tuple[WeightsUpdate, WeightsRefs]:
        answers = await self._repairing("publish", (version,), f"publish version {version}", self._deadlines.weights_s)
        sent: tuple[WeightsUpdate, WeightsRefs] = answers[0]
        self._published, self._from_checkpoint = version, False
        self._whole.set()
        return sent

    async def keyframe(self) -> tuple[WeightsUpdate, WeightsRefs]:
        """The last published version, complete in itself, for engines that hold another or none.

        Before the first `publish` it is the version that the run started from. Answered while a step runs; where the
        ranks are being replaced, after that.

        Raises:
            NoAnswer: not within `deadlines.weights_s`.
        """
        who, asked, deadline_s = self._name(0), "make a keyframe of the weights", self._deadlines.weights_s
        return await answer(self._keyframe(), who=who, asked=asked, deadline_s=deadline_s, node=self._where(0))

    async def _keyframe(self) -> tuple[WeightsUpdate, WeightsRefs]:
        while True:
            await self._whole.wait()
            try:
                made: tuple[WeightsUpdate, WeightsRefs] = await self._ranks[0].keyframe.remote()
            except RayActorError:
                await asyncio.sleep(_LOOK_AGAIN_S)  # whoever works with the ranks notices, and replaces them
            else:
                return made

    async def save(self, folder: Path) -> None:
        """Write a checkpoint's `policy/` and `state/` below `folder`.

        Raises:
            DiskFull: a rank found no room. All ranks go on.
        """
        await self._write("save", folder, "write a checkpoint")

    async def save_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder `policy/` below `folder`.

        Raises:
            DiskFull: there is no room. All ranks go on.
        """
        await self._write("save_policy", folder, "write its policy")

    async def _write(self, method: str, folder: Path, asked: str) -> None:
        try:
            await self._repairing(method, (str(folder),), asked, self._deadlines.checkpoint_s)
        except RayTaskError as error:
            if isinstance(error.cause, DiskFull):
                raise DiskFull(str(error.cause)) from None
            raise

    async def numerics(self) -> dict[str, str]:
        """What decides the last bits of a step; where ranks differ, the values of all of them."""
        answers = await self._repairing("numerics", (), "say what it runs on", self._deadlines.rank_s)
        return {name: " and ".join(sorted({found[name] for found in answers})) for name in answers[0]}

    async def pid(self, rank: int) -> int:
        """The process of a rank."""
        asked, deadline_s = "give its process id", self._deadlines.rank_s
        return await answer(self._ranks[rank].pid.remote(), who=self._name(rank), asked=asked, deadline_s=deadline_s)

    @property
    def node_ids(self) -> list[str]:
        """Ray's ids of the ranks' nodes, in the order of the ranks."""
        return [node_id for _, node_id in self._nodes]

    async def move(self, cause: str) -> None:
        """Replace all ranks by new ones, from the last checkpoint; Ray places them on nodes that stay."""
        await self._repairing("node", (), "start elsewhere", self._deadlines.start_s, moved=cause)

    def stop(self) -> None:
        """End the ranks, and give their places back."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks, self._nodes = [], []
        self._places.give_back()

    def checkpointed(self, step: int, state: Path) -> None:
        """The checkpoint of `step` is whole and lies at `state`: from now on the group repairs itself from there."""
        self._snapshot, self._snapshot_step = state, step

    async def _start(self) -> int:
        size = self._workers.num_ranks
        await self._places.reserve(self._on_change)
        self._ranks = [
            LearnerRank.options(  # type: ignore[attr-defined]
                num_cpus=self._workers.num_cpus,
                num_gpus=self._workers.num_gpus,
                resources=self._workers.resources,
                runtime_env={"env_vars": training_environment()},
                **self._places.options(rank),
            ).remote(self._settings, self._workers, rank, self._deadlines.rank_s)
            for rank in range(size)
        ]
        start_s = self._deadlines.start_s
        self._nodes = await self._all("node", (), "start", start_s, watch=False)
        address = (await self._all("address", (), "start", start_s, watch=False))[0]
        state = str(self._snapshot) if self._snapshot else None
        answers = await self._all("load", (address, state), "load its model", start_s, watch=False)
        return int(answers[0])

    async def _repairing(
        self, method: str, arguments: tuple[Any, ...], asked: str, deadline_s: float, *, moved: str = ""
    ) -> Any:
        """Call all ranks; where one fails, replace them, train again what the checkpoint lacks, and repeat the call.

        With `moved`, the reason, they are replaced first.
        """
        for attempt in range(_MAX_REFORMS + 1):
            if attempt > 1:
                await asyncio.sleep(_PAUSE_S * 4 ** (attempt - 2))
            try:
                if attempt or moved:
                    await self._reform(moved or "a rank was lost")
                return await self._all(method, arguments, asked, deadline_s)
            except RankFailure as failure:
                if attempt == _MAX_REFORMS:
                    raise
                consequence = f"the learner re-forms from step {self._snapshot_step}"
                self._on_change(Event(failure.kind, failure.who, failure.what, consequence, failure.node))
        raise AssertionError("unreachable")

    async def _reform(self, cause: str) -> None:
        self._whole.clear()
        self.stop()
        await self._start()
        if self._published == self._snapshot_step:
            await self._seed()
        for step in range(self._snapshot_step + 1, self._step + 1):
            await self._all("step", (self._logged(step), step - 1), f"train step {step} again", self._deadlines.learn_s)
            if self._published == step:
                await self._seed()
        again = f"trained steps {self._snapshot_step + 1} to {self._step} again"
        again = again if self._step > self._snapshot_step else f"goes on after step {self._step}"
        self._on_change(Event("restart", "the learner", cause, again, self._where(0)))

    async def _seed(self) -> None:
        """Tell new ranks that what they hold now is the published version: the next one builds on it."""
        arguments, asked = (self._published, self._from_checkpoint), "take stock of its weights"
        await self._all("seed", arguments, asked, self._deadlines.weights_s)
        self._whole.set()

    async def _all(
        self, method: str, arguments: tuple[Any, ...], asked: str, deadline_s: float, *, watch: bool = True
    ) -> list[Any]:
        """One call on every rank, all answers, or the error of the one to blame.

        Where the object store loses the arguments before any rank has begun, they are sent again.

        Raises:
            RankFailure: a rank died, did not get on for `deadlines.rank_s`, or did not get what others work on.
            NoAnswer: all of them worked, but not within the deadline.
        """
        for sent in range(1, _MAX_SENDS + 1):
            try:
                return await self._once(method, arguments, asked, deadline_s, watch=watch)
            except BatchLost as lost:
                if sent == _MAX_SENDS:
                    raise
                self._on_change(
                    Event("lost", f"the batch to {asked} on", str(lost), "no rank had it: it is sent again")
                )
        raise AssertionError("unreachable")

    async def _once(
        self, method: str, arguments: tuple[Any, ...], asked: str, deadline_s: float, *, watch: bool
    ) -> list[Any]:
        shared = [ray.put(argument) if isinstance(argument, list) else argument for argument in arguments]
        calls = [
            asyncio.ensure_future(
                answer(
                    getattr(rank, method).remote(*shared),
                    who=self._name(number),
                    asked=asked,
                    deadline_s=deadline_s,
                    node=self._where(number),
                )
            )
            for number, rank in enumerate(self._ranks)
        ]
        watcher = asyncio.ensure_future(self._watch(asked, moving=method == "step")) if watch else None
        try:
            pending: set[asyncio.Future[Any]] = {*calls, *([watcher] if watcher else [])}
            while not all(call.done() for call in calls):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if any(future.exception() for future in done):
                    await self._blame(calls, watcher, asked)
            return [call.result() for call in calls]
        finally:
            for future in (*calls, *([watcher] if watcher else [])):
                future.cancel()
            await asyncio.gather(*calls, *([watcher] if watcher else []), return_exceptions=True)

    async def _blame(
        self, calls: Sequence[asyncio.Future[Any]], watcher: asyncio.Future[Any] | None, asked: str
    ) -> None:
        """Raise for the rank that failed first: survivors of a death report broken connections, often sooner.

        A rank that cannot fetch its arguments does not begin. Others that did wait for it in a collective, half-way
        through the step: they cannot take it back, so all are replaced.
        """
        expires = time.monotonic() + self._deadlines.rank_s + _BLAME_S
        waits_for_others = time.monotonic() + _BLAME_S
        while True:
            if watcher is not None and watcher.done():
                watcher.result()
            errors = {number: call.exception() for number, call in enumerate(calls) if call.done()}
            for number, error in errors.items():
                if isinstance(error, RayActorError):
                    what = f"died while asked to {asked}: {first_line(error)}"
                    raise RankFailure(self._name(number), what, self._where(number)) from error
            running = [call for call in calls if not call.done()]
            lost = {number: error for number, error in errors.items() if _is_lost(error)}
            if lost and len(lost) == len(calls):
                raise BatchLost(_said(next(iter(lost.values()))))
            if lost and (not running or time.monotonic() > waits_for_others):
                number, error = next(iter(lost.items()))
                what = f"did not get what it was asked to {asked} on: {_said(error)}"
                raise RankFailure(self._name(number), what, self._where(number), kind="lost") from error
            own = [error for error in errors.values() if _is_own(error)]
            if own or not running or time.monotonic() > expires:
                raise next(error for error in (*own, *errors.values()) if error is not None)
            await asyncio.wait([*running, *([watcher] if watcher else [])], timeout=1.0)

    async def _watch(self, asked: str, *, moving: bool) -> None:
        """Ends only by raising: for the rank that does not answer, or the one furthest behind when none gets on."""
        silent_s = self._deadlines.rank_s
        last: list[int] = []
        moved = time.monotonic()
        while True:
            await asyncio.sleep(min(_LOOK_AGAIN_S, silent_s / 4))
            passes = []
            for number, rank in enumerate(self._ranks):
                name = self._name(number)
                try:
                    passes.append(await answer(rank.progress.remote(), who=name, asked=asked, deadline_s=silent_s))
                except RayActorError as error:  # heard here before the call that it died in fails
                    what = f"died while asked to {asked}: {first_line(error)}"
                    raise RankFailure(name, what, self._where(number)) from error
                except NoAnswer as error:
                    what = f"has not answered for {silent_s:g} s while asked to {asked}"
                    raise RankFailure(name, what, self._where(number)) from error
            if passes != last:
                last, moved = passes, time.monotonic()
            elif moving and time.monotonic() - moved > silent_s:
                behind = [rank for rank, done in enumerate(passes) if done == min(passes)]
                what = f"has not got on for {silent_s:g} s while asked to {asked}"
                names = " or ".join(self._name(rank) for rank in behind)
                raise RankFailure(names, what, self._where(behind[0]) if len(behind) == 1 else "")

    def _where(self, number: int) -> str:
        return self._nodes[number][0] if self._nodes else ""

    def _name(self, number: int) -> str:
        return "the learner" if self._workers.num_ranks == 1 else f"learner rank {number} of {self._workers.num_ranks}"


async def _asked_for(asked: Mapping[str, float]) -> str:
    return f"waits for {', '.join(f'{amount:g} {name}' for name, amount in sorted(asked.items()))} on a node"


def _is_lost(error: BaseException | None) -> bool:
    """Whether a call was not made because an argument of it is gone."""
    return isinstance(error.cause if isinstance(error, RayTaskError) else error, ObjectLostError)


def _said(error: BaseException | None) -> str:
    """What Ray says of a lost object, in one line and without its advice."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    said = re.sub(r"To see information about where .*?`ray\.init\(\)`\.", "", " ".join(str(cause).split()))
    return " ".join(said.split(" Check cluster logs")[0].split())


def _is_own(error: BaseException | None) -> bool:
    """What a rank says of the batch or of itself, not of a lost connection."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return isinstance(cause, (ValueError, ArithmeticError, OSError, NoAnswer)) and not isinstance(
        cause, ConnectionError
    )
