"""Workers that follow the work, on nodes that Ray's own autoscaler adds and removes; and each constant number."""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from benchmarks.cluster.fake_nodes import autoscaled_head
from benchmarks.cluster.paced_actor import pace
from benchmarks.cluster.paced_run import Paced, Told, run
from cluster.nodes import look
from contracts.clock import now

PLACES, BATCH = 8, 32
IDLE_S = 6.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-workers", type=int, default=4)
    parser.add_argument("--slow-steps", type=int, default=15, help="in the first and in the last phase")
    parser.add_argument("--fast-steps", type=int, default=80, help="in the second")
    parser.add_argument("--slow-s", type=float, default=8.8, help="a step of the learner in the slow phases")
    parser.add_argument("--fast-s", type=float, default=2.2, help="a step in the fast one")
    parser.add_argument("--response-s", type=float, default=2.0, help="mean of a response in a place of an engine")
    parser.add_argument("--start-s", type=float, default=8.0, help="an engine's start, beside its process and node")
    parser.add_argument("--interval-s", type=float, default=5.0, help="between two decisions, at least")
    parser.add_argument("--constant", type=int, nargs="*", default=[1, 2, 3, 4], help="numbers to compare with")


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    with autoscaled_head(folder, max_nodes=arguments.max_workers, idle_s=IDLE_S) as address:
        variables = pace(response_s=arguments.response_s, start_s=arguments.start_s)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})
        try:
            plans, told, node_s = asyncio.run(_all(arguments, folder))
        finally:
            ray.shutdown()
    _print(arguments, plans, told, node_s)


async def _all(arguments: argparse.Namespace, folder: Path) -> tuple[list[Paced], list[Told], float]:
    """All runs at the same time, so that what else the machine does falls on all of them: they take no core."""

    def learn_s(version: int) -> float:
        fast = arguments.slow_steps <= version < arguments.slow_steps + arguments.fast_steps
        return float(arguments.fast_s if fast else arguments.slow_s)

    def plan(workers: int, *, most: int | None = None) -> Paced:
        return Paced(
            name=f"1 to {most}, following" if most else f"constant {workers}",
            workers=workers,
            places=PLACES,
            steps=2 * arguments.slow_steps + arguments.fast_steps,
            batch_size=BATCH,
            learn_s=learn_s,
            resources={"rollout": 1.0} if most else {"fixed": 1.0},
            max_workers=most,
            interval_s=arguments.interval_s,
        )

    plans = [*(plan(number) for number in arguments.constant), plan(1, most=arguments.max_workers)]
    told, started = [Told() for _ in plans], asyncio.Barrier(len(plans))
    nodes: list[float] = [0.0]
    async with asyncio.TaskGroup() as tasks:
        runs = []
        for number, (each, shown) in enumerate(zip(plans, told, strict=True)):
            place = Path(tempfile.mkdtemp(dir=folder, prefix=f"{number}-"))
            runs.append(tasks.create_task(run(each, place, shown, started=started)))
        counting = tasks.create_task(_node_seconds(nodes))
        await runs[-1]
        counting.cancel()
    return plans, told, nodes[0]


async def _node_seconds(found: list[float]) -> None:
    at = now()
    while True:
        await asyncio.sleep(1.0)
        alive = len((await asyncio.to_thread(look)).alive) - 1  # without the head
        found[0] += alive * (now() - at)
        at = now()


def _print(arguments: argparse.Namespace, plans: Sequence[Paced], told: Sequence[Told], node_s: float) -> None:
    steps = (arguments.slow_steps, arguments.slow_steps + arguments.fast_steps)
    print(
        f"Engines are paced, not vLLM: {PLACES} places, {arguments.response_s:g} s a response (half more or less), "
        f"{arguments.start_s:g} s to start. The learner is paced: a step of {BATCH} responses takes "
        f"{arguments.slow_s:g} s, in the middle phase {arguments.fast_s:g} s.\n"
    )
    print("| workers | seconds | samples/s | worker-seconds | learner busy: slow, fast, slow |")
    print("| --- | ---: | ---: | ---: | --- |")
    for plan, shown in zip(plans, told, strict=True):
        phases = [shown.rows[: steps[0]], shown.rows[steps[0] : steps[1]], shown.rows[steps[1] :]]
        busy = ", ".join(f"{_sum(rows, 'learn_s') / _sum(rows, 'step_s'):.1%}" for rows in phases)
        rate = plan.steps * BATCH / shown.seconds
        print(f"| {plan.name} | {shown.seconds:.0f} | {rate:.2f} | {shown.worker_s:.0f} | {busy} |")
    following = told[-1]
    need = _sum(following.rows[: steps[0]], "step_s")
    print(f"\nThe nodes of the following run: {node_s:.0f} node-seconds. The fast phase begins at {need:.0f} s:\n")
    for at, event in following.events:
        if event.event in ("scale", "start", "drain", "pending"):
            print(f"- {at:.1f} s: {event.who} {event.consequence or 'is there'} ({event.cause})")
    print("\n| worker | asked for, s after the need | serves, s after that | first sample, s after the need |")
    print("| --- | ---: | ---: | ---: |")
    scales = [at for at, event in following.events if event.event == "scale" and "the learner waits" in event.cause]
    for at, event in following.events:
        if event.event == "start" and event.who.startswith("rollout-") and at > need:
            asked = max((scale for scale in scales if scale < at), default=at)
            first = following.first_sample.get(event.who)
            sample = "none" if first is None else f"{first - need:.1f}"
            print(f"| {event.who} | {asked - need:.1f} | {at - asked:.1f} | {sample} |")


def _sum(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows))
