"""A running run: its parts, and who may start what. Everybody who waits for a worker or for freshness waits here."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.leases import Lease, LeaseBook
from contracts.clock import BusyClock
from contracts.config import Config
from contracts.records import Prompt, Rollout
from contracts.stopping import StopRequest
from learner.checkpoint import Checkpoint
from learner.experience_queue import ExperienceQueue, StalenessBound

if TYPE_CHECKING:  # a simulation brings its own
    from actors.pool import RolloutPool
    from actors.prompts import PromptStream
    from actors.reference import ReferenceModel
    from actors.reward import RewardComponents
    from actors.worker import Worker
    from cluster.loop import Loop
    from cluster.progress import Progress
    from cluster.resume import Resumption
    from cluster.run_log import RunLog
    from cluster.scaling import Scaling
    from cluster.serving import ServingLink
    from cluster.watch import Watch
    from learner.group import LearnerGroup


@dataclass
class Job:
    """The parts of a running run. `version` is the published one, `choosing` the one the next batch trains at."""

    config: Config
    run_id: str
    prompts: PromptStream
    eval_prompts: list[Prompt]
    pool: RolloutPool
    learner: LearnerGroup
    rewards: RewardComponents
    judges: RewardComponents
    reference: ReferenceModel
    queue: ExperienceQueue
    leases: LeaseBook
    log: RunLog
    progress: Progress
    stopping: StopRequest
    version: int = 0
    choosing: int = 0
    pending: list[Prompt] = field(default_factory=list)
    scoring: BusyClock = field(default_factory=BusyClock)
    bad_reasons: list[str] = field(default_factory=list)  # of what was quarantined since the last batch
    expired_in_a_row: int = 0
    dropped_in_a_row: int = 0
    last_checkpoint: Checkpoint | None = None
    sampled: bool = False  # whether a training response has come
    checkpoint_overdue: bool = False  # the disk had no room for it: tried again after each step
    resumption: Resumption | None = None  # None: a fresh run
    standing: dict[str, Any] = field(default_factory=dict)  # when the newest batch was chosen, or at the start
    scaling: Scaling | None = None  # with rollout.autoscale
    serving: ServingLink | None = None  # with `serving`
    watch: Watch | None = None  # with `watch`
    loop: Loop | None = None  # with `loop`
    leaving: dict[str, float] = field(default_factory=dict)  # ids of nodes that drain -> when they go, on our clock
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)  # what decides the learner's last bits
    _collector: asyncio.Future[tuple[Lease, Worker]] | None = None  # set while `next_lease` waits
    _next_round: asyncio.Future[None] | None = None  # set while `next_round` waits
    _homeless: deque[tuple[Lease, int, asyncio.Future[Worker]]] = field(default_factory=deque)

    @property
    def bound(self) -> StalenessBound:
        return self.leases.bound

    @property
    def more_wanted(self) -> bool:
        """Whether the open groups do not yet fill all batches up to the last step."""
        batches = self.config.steps - self.choosing
        return self.leases.open_groups < batches * self.bound.groups_per_batch

    @property
    def alarmed(self) -> bool:
        """Whether an alarm ends the run."""
        return self.watch is not None and self.watch.ended is not None

    async def reference_logprobs(self, rollout: Rollout) -> list[float]:
        """Of a training response; none where nothing would use them."""
        if not self.config.algorithm.monitor_kl:
            return []
        return await self.reference.logprobs(rollout.prompt_tokens, rollout.response_tokens)

    async def notify(self) -> None:
        """Something that lets waiting groups or a waiting learner go on has happened.

        Decides for those that wait and wakes only who can go on: most responses wake nobody.
        """
        await self.offer_places()
        self.queue.notify()

    async def offer_places(self) -> None:
        """Let groups that wait for a place start where there is one now; the learner sleeps on."""
        while self._homeless:
            lease, num_requests, found = self._homeless[0]
            if not found.done():
                worker = self.pool.reserve(num_requests, oldest_version=lease.started_version)
                if worker is None:
                    break
                found.set_result(worker)
            self._homeless.popleft()
        if self._collector is not None and not self._collector.done():
            issued = self._issue()
            if issued is not None:
                self._collector.set_result(issued)
        if self._next_round is not None and not self._next_round.done() and self.lacking:
            self._next_round.set_result(None)

    async def next_lease(self) -> tuple[Lease, Worker]:
        """Wait until a worker has room and the staleness bound lets another group start there. One task may wait.

        What unblocks it: a finished response, a batch taken by the learner, a published version, a new worker.
        """
        issued = self._issue()
        if issued is None:
            self._collector = asyncio.get_running_loop().create_future()
            issued = await self._collector
        return issued

    @property
    def lacking(self) -> int:
        """Groups that the next batch lacks and that may start on the published weights, in a deterministic run."""
        if not self.more_wanted:
            return 0
        started = self.leases.started()
        return max(0, self.bound.room(started, version=self.version, training_version=self.choosing))

    async def next_round(self) -> list[Lease]:
        """The leases of the next round of a deterministic run: all that the next batch lacks. One task may wait.

        What unblocks it: a published version.
        """
        while not self.lacking:
            self._next_round = asyncio.get_running_loop().create_future()
            await self._next_round
        num_workers = self.config.rollout.num_workers
        leases = [
            self.leases.issue(self._next_prompt(), version=self.version, actor_id=f"rollout-{number % num_workers}")
            for number in range(self.lacking)
        ]
        self.queue.settle(self.leases.oldest_running)
        return leases

    async def another_worker(self, lease: Lease, num_requests: int) -> tuple[Lease, Worker]:
        """A lease whose worker died, issued again as soon as there is room elsewhere, first come first served.

        Not on weights older than it was admitted for: an engine that has yet to take them would break the bound.
        """
        found: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._homeless.append((lease, num_requests, found))
        await self.notify()
        worker = await found
        return self.leases.reissue(lease, version=worker.version, actor_id=worker.actor_id), worker

    def _issue(self) -> tuple[Lease, Worker] | None:
        if not self.more_wanted:
            return None
        oldest = self.leases.oldest_start(training_version=self.choosing)
        worker = self.pool.reserve(self.leases.num_samples, oldest_version=oldest)
        if worker is None:
            return None
        lease = self.leases.issue(self._next_prompt(), version=worker.version, actor_id=worker.actor_id)
        self.queue.settle(self.leases.oldest_running)
        return lease, worker

    def _next_prompt(self) -> Prompt:
        return self.pending.pop(0) if self.pending else self.prompts.next()
