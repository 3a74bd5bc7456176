"""Seconds and memory: many votes aggregated, written one by one and at once."""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from contracts.preferences import SimulatedVotes, VoterGroup
from feedback.annotators import krippendorff_alpha, side_bias
from feedback.ballots import Ballots
from feedback.crowd_bt import crowd_bradley_terry
from feedback.quality import dawid_skene, majority
from feedback.simulate import Pair, simulate_votes
from feedback.store import DatasetQuery, Judgment, Store


def speed(arguments: argparse.Namespace) -> None:
    """Seconds and memory for many votes: 5 a pair, 500 voters, some bad; a tenth are ties."""
    count = arguments.judgments
    rng = np.random.default_rng(0)
    pairs = np.arange(count) // 5
    voters = (pairs * 5 + rng.integers(0, 100, len(pairs)) * 5 + np.arange(count) % 5) % 500
    right = rng.random(count) < np.where(voters < 50, 0.2, np.where(voters < 150, 0.5, 0.8))
    choices = np.where(rng.random(count) < 0.1, "tie", np.where(right == ((pairs % 2) == 0), "a", "b"))
    columns = ([f"{p:07d}" for p in pairs.tolist()], [f"{v:03d}" for v in voters.tolist()], choices.tolist())
    left = np.where(rng.random(count) < 0.5, "a", "b").tolist()
    seconds = rng.lognormal(3, 0.5, count)
    Ballots.from_columns(["x"], ["y"], ["a"])  # what the first call loads is no part of it
    print("| step | seconds | of the processor | peak memory more, MiB |\n| --- | ---: | ---: | ---: |")
    ballots = timed("columns to arrays", lambda: Ballots.from_columns(*columns, left=left, active_s=seconds))
    timed("majority", lambda: majority(ballots))
    found = timed("Dawid-Skene", lambda: dawid_skene(ballots))
    strengths = timed("Crowd-BT, pairs by themselves", lambda: crowd_bradley_terry(ballots))
    timed("alpha and side flags", lambda: (krippendorff_alpha(ballots), side_bias(ballots)))
    print(f"\n{len(ballots.pairs_N):,} votes, {len(ballots.pair_ids):,} pairs, {len(ballots.voters)} voters; ", end="")
    print(f"{found.iterations} and {strengths.iterations} iterations")


def store(arguments: argparse.Namespace) -> None:
    """Votes a second, acknowledged when they are synced; seconds from many votes in the store to probabilities."""
    with tempfile.TemporaryDirectory(prefix="headrace-store-") as folder:
        print(f"fsync of 4 KiB there: {1000 * fsync_s(Path(folder)):.2f} ms, the median of 100\n")
        print("| one by one | votes | a second | of the processor, ms each |\n| --- | ---: | ---: | ---: |")
        with Store(Path(folder) / "asked.db") as asked:
            pairs = [Pair(f"{n:07d}", "", f"question {n}", "x", "y") for n in range(5000)]
            asked.add_pairs(pairs, source="file", required_votes=5)
            for threads in (1, 8):
                one_by_one(asked, threads)
        print("\n| many at once | seconds | of the processor | peak memory more, MiB |")
        print("| --- | ---: | ---: | ---: |")
        with Store(Path(folder) / "many.db") as many:
            bulk(many, Path(folder), arguments.judgments)
            print(f"\nthe file of the store: {(Path(folder) / 'many.db').stat().st_size / 2**20:.0f} MiB")


def fsync_s(folder: Path) -> float:
    took = []
    with (folder / "synced").open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - start)
    return float(np.median(took))


def one_by_one(asked: Store, threads: int) -> None:
    """Each thread is an annotator who asks for a task and votes, 200 times."""
    people = [asked.register(f"{threads}-{number}")[0] for number in range(threads)]

    def work(annotator: int) -> None:
        for _ in range(200):
            given = asked.next_task(annotator)
            if given is None:
                raise RuntimeError("there are fewer tasks than votes")
            asked.submit(annotator, given.task_id, Judgment(given.lease_id, choice="a"), lease_id=given.lease_id)

    start, start_cpu, votes = time.perf_counter(), time.process_time(), 200 * threads
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, people))
    took_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    print(f"| asked, then voted: {threads} at once | {votes} | {votes / took_s:.0f} | {1000 * cpu_s / votes:.1f} |")


def bulk(many: Store, folder: Path, count: int) -> None:
    pairs = [Pair(f"{n:07d}", "", f"question {n}", f"x {n}", f"y {n}") for n in range(count // 5)]
    panel = {"good": VoterGroup(count=400, accuracy=0.8), "random": VoterGroup(count=100, accuracy=0.5)}
    config = SimulatedVotes(gold="examples.judges:vader", votes_per_pair=5, voters=panel)
    votes = simulate_votes(pairs, [float(n % 2) for n in range(len(pairs))], [0.5] * len(pairs), config, seed=0)
    timed(f"{len(pairs):,} pairs in", lambda: many.add_pairs(pairs, source="live", required_votes=5))
    timed(f"{len(votes):,} votes in", lambda: many.add_votes(votes))
    timed("votes out, as arrays", many.ballots)
    timed("majority, from store to store", lambda: many.aggregate(method="majority"))
    run = timed("Dawid-Skene, from store to store", many.aggregate)
    exported, query = folder / "exported.parquet", DatasetQuery(run.aggregate_id)
    timed("preferences out, Parquet", lambda: many.export_preferences("all", query, exported))
    with Store(folder / "imported.db") as imported:
        timed("preferences in, Parquet", lambda: imported.import_preferences(exported))


def timed(name: str, work: Callable[[], Any]) -> Any:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    result = work()
    took_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    more_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    print(f"| {name} | {took_s:.2f} | {cpu_s:.2f} | {more_kib / 1024:.0f} |", flush=True)
    return result
