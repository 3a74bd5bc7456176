"""What strikes a run, by kind: each function does it once, from outside, and says what it did.

`queue` has no kind of its own: the queue lives in the driver's process, so `driver_killed` is that strike.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from benchmarks.chaos.attacked import CHECKPOINT_EVERY, NODE_CPUS, NODE_RESOURCES, Attacked, Missed
from benchmarks.chaos.recovery import Strike, Test
from tests.small_disk import SmallDisk

LOOK_S = 0.5  # over which an engine's use of its core is measured
IDLE, BUSY = 0.1, 0.3  # shares of a core
MOMENT_S = 120.0  # how long a moment that a strike needs is waited for
UPDATE_S = 12.0  # less than deadlines.silent_s: longer, and the run itself takes a stopped engine for dead
NOTICE_S = 30.0
REWARD, REFERENCE = "reward component letter", "the reference model"


def happened(kind: str, who: str, cause: str = "") -> Test:
    """An event of that kind, of whoever's name begins with `who`, and with `cause` in its cause."""
    return lambda event: event["event"] == kind and event["who"].startswith(who) and cause in event["cause"]


def rollout_idle(run: Attacked, lot: random.Random) -> Strike:
    return _killed_worker(run, lot, "rollout_idle", lambda share: share < IDLE)


def rollout_generating(run: Attacked, lot: random.Random) -> Strike:
    return _killed_worker(run, lot, "rollout_generating", lambda share: share > BUSY)


def rollout_updating(run: Attacked, lot: random.Random) -> Strike:
    """Its core is stopped, so that the next weights begin to arrive and cannot be taken; then it is killed."""
    expires = time.monotonic() + 3 * MOMENT_S
    while time.monotonic() < expires:
        actor, core = lot.choice(run.workers())
        published = run.step
        core.suspend()
        with suppress(Missed):
            run.next_step(deadline_s=UPDATE_S)
        if run.step > published:
            time.sleep(0.3)  # the news of it travels
            struck = time.time()
            actor.kill()
            return Strike("rollout_updating", f"rollout actor {actor.pid}", struck, happened("death", "rollout-"))
        core.resume()
        time.sleep(2.0)
    raise Missed("no version was published while an engine core was stopped")


def rollout_stopped(run: Attacked, lot: random.Random) -> Strike:
    actor, _ = lot.choice(run.workers())
    return _stopped("rollout_stopped", actor, happened("death", "rollout-"))


def core_stopped(run: Attacked, lot: random.Random) -> Strike:
    _, core = lot.choice(run.workers())
    return _stopped("core_stopped", core, happened("death", "rollout-"))


def rank_killed(run: Attacked, lot: random.Random) -> Strike:
    rank = _one(run, lot, "ray::LearnerRank")
    struck = time.time()
    rank.kill()
    return Strike("rank_killed", f"learner rank, process {rank.pid}", struck, happened("death", "learner rank"))


def rank_stopped(run: Attacked, lot: random.Random) -> Strike:
    return _stopped("rank_stopped", _one(run, lot, "ray::LearnerRank"), happened("death", "learner rank"))


def reward_killed(run: Attacked, lot: random.Random) -> Strike:
    return _killed_replica(run, lot, "reward_killed", "letter", REWARD)


def reference_killed(run: Attacked, lot: random.Random) -> Strike:
    return _killed_replica(run, lot, "reference_killed", "reference", REFERENCE)


def replica_stopped(run: Attacked, lot: random.Random) -> Strike:
    application, who = lot.choice([("letter", REWARD), ("reference", REFERENCE)])
    return _stopped("replica_stopped", _replica(run, lot, application), happened("death", who))


def node_notice(run: Attacked, lot: random.Random) -> Strike:
    """Drained, taken away at its deadline if it did not go before, and another node takes its place."""
    node = lot.choice(run.cluster.node_ids)
    struck = time.time()
    run.cluster.drain(node, notice_s=NOTICE_S)
    with suppress(Missed):
        gone = happened("death", f"node {node[:8]}")
        shown = lambda: any(gone(event) for event in run.events if event["time"] > struck)  # noqa: E731
        run.until(shown, f"end of node {node[:8]}", deadline_s=NOTICE_S)
    run.cluster.kill(node)
    run.cluster.add(num_cpus=NODE_CPUS, resources=NODE_RESOURCES)
    name = f"node {node[:8]}"
    return Strike("node_notice", name, struck, happened("drain", name), until=happened("death", name))


def node_lost(run: Attacked, lot: random.Random) -> Strike:
    node = lot.choice(run.cluster.node_ids)
    struck = time.time()
    run.cluster.kill(node)
    run.cluster.add(num_cpus=NODE_CPUS, resources=NODE_RESOURCES)
    return Strike("node_lost", f"node {node[:8]}", struck, happened("death", f"node {node[:8]}"))


def driver_killed(run: Attacked, lot: random.Random) -> Strike:
    struck = time.time()
    pid = run.kill_driver()
    run.start(resume=True)
    return Strike("driver_killed", f"process {pid}", struck, happened("resume", "the run"))


def checkpoint_corrupt(run: Attacked, lot: random.Random) -> Strike:
    """A byte of the newest checkpoint is turned while the driver is dead."""
    run.until(lambda: len(run.checkpoints) >= 2, "second checkpoint", deadline_s=3 * MOMENT_S)
    struck = time.time()
    run.kill_driver()
    newest = run.checkpoints[-1]
    file = lot.choice(sorted(newest.rglob("*.safetensors")))
    content = bytearray(file.read_bytes())
    content[lot.randrange(len(content))] ^= 0xFF
    file.write_bytes(content)
    run.start(resume=True)
    return Strike("checkpoint_corrupt", newest.name, struck, happened("resume", "the run", cause=f"{newest.name}/"))


def object_lost(run: Attacked, lot: random.Random) -> Strike:
    assert run.driver is not None
    struck = time.time()
    run.driver.send_signal(signal.SIGUSR1)
    return Strike("object_lost", "the next batch", struck, happened("lost", ""), from_sign=True)


def disk_full(run: Attacked, lot: random.Random) -> Strike:
    """Half a checkpoint's room is left, so that logs go on; it is given back when the run has said so."""
    run.until(lambda: run.checkpoints, "first checkpoint", deadline_s=3 * MOMENT_S)
    disk = SmallDisk(run.run_dir.parent)
    size = sum(file.stat().st_size for file in run.checkpoints[-1].rglob("*") if file.is_file())
    struck = time.time()
    disk.fill(leave_bytes=size // 2)
    full = happened("disk_full", "")
    try:
        shown = lambda: any(full(event) for event in run.events if event["time"] > struck)  # noqa: E731
        run.until(shown, "event that the disk is full", deadline_s=CHECKPOINT_EVERY * MOMENT_S)
    finally:
        disk.empty()
    written = happened("checkpoint", "the learner")
    return Strike("disk_full", "a checkpoint", struck, full, until=written, from_sign=True)


KINDS: dict[str, Callable[[Attacked, random.Random], Strike]] = {
    strike.__name__: strike
    for strike in (
        rollout_idle,
        rollout_generating,
        rollout_updating,
        rollout_stopped,
        core_stopped,
        reward_killed,
        reference_killed,
        replica_stopped,
        rank_killed,
        rank_stopped,
        node_notice,
        node_lost,
        driver_killed,
        checkpoint_corrupt,
        object_lost,
        disk_full,
    )
}


def let_go(run: Attacked) -> list[str]:
    """Stopped processes that the run has replaced and not ended: they are ended here, and named."""
    left = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:
                left.append(f"{process.pid} {' '.join(process.cmdline())[:60]}")
                process.kill()
    return left


def _killed_worker(run: Attacked, lot: random.Random, kind: str, wanted: Callable[[float], bool]) -> Strike:
    expires = time.monotonic() + MOMENT_S
    while time.monotonic() < expires:
        workers = run.workers()
        lot.shuffle(workers)
        before = [_cpu_s(core) for _, core in workers]
        time.sleep(LOOK_S)
        for (actor, core), used in zip(workers, before, strict=True):
            if wanted((_cpu_s(core) - used) / LOOK_S):
                struck = time.time()
                actor.kill()
                return Strike(kind, f"rollout actor, process {actor.pid}", struck, happened("death", "rollout-"))
    raise Missed(f"no engine was in the state that {kind} wants for {MOMENT_S:g} s")


def _killed_replica(run: Attacked, lot: random.Random, kind: str, application: str, who: str) -> Strike:
    replica = _replica(run, lot, application)
    struck = time.time()
    replica.kill()
    return Strike(kind, f"process {replica.pid}", struck, happened("death", who))


def _stopped(kind: str, process: psutil.Process, sign: Test) -> Strike:
    struck = time.time()
    process.suspend()
    return Strike(kind, f"process {process.pid}", struck, sign)


def _replica(run: Attacked, lot: random.Random, application: str) -> psutil.Process:
    found = [each for each in run.processes("ray::ServeReplica") if f"-{application}:" in " ".join(each.cmdline())]
    if not found:
        raise Missed(f"no replica of {application} runs")
    return lot.choice(found)


def _one(run: Attacked, lot: random.Random, title: str) -> psutil.Process:
    found = run.processes(title)
    if not found:
        raise Missed(f"no process {title} runs")
    return lot.choice(found)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
