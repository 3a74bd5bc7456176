"""A worker's node is given notice and taken away, again and again; beside it the same run on nodes that stay."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray

from benchmarks.cluster.paced_actor import pace
from benchmarks.cluster.paced_run import Paced, Told, run
from tests.nodes import NodeCluster

WORKERS, PLACES, BATCH = 4, 16, 64
LEARN_S = 1.0
_ATTEMPTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every-s", type=float, default=30.0, help="between two notices")
    parser.add_argument("--notice-s", type=float, default=8.0, help="from the notice to the kill")
    parser.add_argument("--node-s", type=float, default=10.0, help="from the notice until another node is there")
    parser.add_argument("--response-s", type=float, default=8.0, help="mean of a response in a place of an engine")
    parser.add_argument("--start-s", type=float, default=8.0, help="an engine's start, beside its process and node")


def measure(arguments: argparse.Namespace, folder: Path) -> int:
    cluster = NodeCluster(head_cpus=1, head_resources={"fixed": 100.0})
    try:
        for _ in range(WORKERS):
            cluster.add(num_cpus=1, resources={"rollout": 1.0})
        variables = pace(response_s=arguments.response_s, start_s=arguments.start_s)
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})
        rate = WORKERS * PLACES / arguments.response_s
        steps = round(arguments.minutes * 60 * rate / BATCH)
        plans = [
            Paced(name, WORKERS, PLACES, steps, BATCH, lambda version: LEARN_S, {resource: 1.0})
            for name, resource in (("quiet", "fixed"), ("struck", "rollout"))
        ]
        told, begun = [Told(), Told()], threading.Event()
        try:
            # Ray starts nodes in the main thread alone.
            with ThreadPoolExecutor(1) as thread:
                running = thread.submit(asyncio.run, _both(plans, told, folder, begun))
                while not begun.wait(1.0) and not running.done():
                    pass
                strikes = _strike(arguments, cluster, running.done)
                running.result()
        finally:
            ray.shutdown()
    finally:
        cluster.shutdown()
    return _print(arguments, told[0], told[1], strikes)


async def _both(plans: list[Paced], told: list[Told], folder: Path, begun: threading.Event) -> None:
    """At the same time, so that what else the machine does falls on both: they take no core."""
    started = asyncio.Barrier(len(plans) + 1)
    async with asyncio.TaskGroup() as tasks:
        for plan, shown in zip(plans, told, strict=True):
            tasks.create_task(run(plan, Path(tempfile.mkdtemp(dir=folder)), shown, started=started))
        await started.wait()
        begun.set()


def _strike(arguments: argparse.Namespace, cluster: NodeCluster, ended: Callable[[], bool]) -> int:
    """The oldest node each time: it has a worker that has worked for a while. Returns how many were taken."""
    strikes, due = 0, time.monotonic() + arguments.every_s / 2
    while True:
        if _slept_until(due, ended):
            return strikes
        node, begun = cluster.node_ids[0], time.monotonic()
        cluster.drain(node, notice_s=arguments.notice_s)
        strikes += 1
        for after_s, is_kill in sorted([(arguments.notice_s, True), (arguments.node_s, False)]):
            _slept_until(begun + after_s, ended)
            if is_kill:
                cluster.kill(node)
            else:
                _add(cluster)
        due += arguments.every_s


def _add(cluster: NodeCluster) -> None:
    """Again where the machine is so loaded that Ray gives a raylet up, which it does after 30 s."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            cluster.add(num_cpus=1, resources={"rollout": 1.0})
            return
        except Exception as error:  # Ray raises nothing more special
            if attempt == _ATTEMPTS:
                raise
            print(f"a node did not come up, another is started: {error}", file=sys.stderr)


def _slept_until(due: float, ended: Callable[[], bool]) -> bool:
    """Whether the runs ended meanwhile."""
    while time.monotonic() < due and not ended():
        time.sleep(0.2)
    return ended()


def problems_of(told: Told, expected: int) -> list[str]:
    """Where what was asked for, what came back and what was trained on differ. All of them end with the run."""
    found = []
    if lost := told.asked.keys() - told.received.keys():
        found.append(f"{len(lost)} trajectories lost: asked for, never received, {min(lost)} among them")
    if doubled := [each for each, times in told.received.items() if times > 1]:
        found.append(f"{len(doubled)} trajectories received twice, {doubled[0]} among them")
    if untrained := told.received.keys() - told.trained.keys():
        found.append(f"{len(untrained)} trajectories received and not trained on, {min(untrained)} among them")
    if again := [each for each, times in told.trained.items() if times > 1]:
        found.append(f"{len(again)} trajectories trained on twice, {again[0]} among them")
    if told.trained.total() != expected:
        found.append(f"{told.trained.total()} trajectories trained on, {expected} were wanted")
    return found


def _print(arguments: argparse.Namespace, quiet: Told, struck: Told, strikes: int) -> int:
    print(
        f"Engines are paced, not vLLM: {WORKERS} of {PLACES} places, {arguments.response_s:g} s a response (half more "
        f"or less), {arguments.start_s:g} s to start; a step of the learner takes {LEARN_S:g} s, so that generation is "
        f"the limit. Every {arguments.every_s:g} s a worker's node gets {arguments.notice_s:g} s of notice and is then "
        f"killed; another node is there {arguments.node_s:g} s after the notice.\n"
    )
    print("| run | nodes taken | seconds | samples/s | issued | received | asked for again | trained on | lost |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    problems = []
    for name, told, taken in (("quiet", quiet, 0), ("struck", struck, strikes)):
        expected = len(told.rows) * BATCH
        lost, again = len(told.asked.keys() - told.trained.keys()), told.asked.total() - len(told.asked)
        print(
            f"| {name} | {taken} | {told.seconds:.0f} | {expected / told.seconds:.2f} | {len(told.asked)} "
            f"| {len(told.received)} | {again} | {len(told.trained)} | {lost} |"
        )
        problems += [f"{name}: {problem}" for problem in problems_of(told, expected)]
    print(f"\nThroughput of the quiet run: {quiet.seconds / struck.seconds:.1%}")
    kinds = Counter(event.event for _, event in struck.events if event.who.startswith("rollout"))
    print(
        f"Events of the struck run's workers: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
    )
    print("\n".join(f"- {problem}" for problem in problems) or "Every trajectory that was issued was trained on, once.")
    return 1 if problems else 0
