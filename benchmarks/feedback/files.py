"""A million rows into the store: seconds, memory, what is left out, and what a kill -9 in the middle leaves behind."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.feedback.speed import timed
from feedback.store import Store

KILLED_AT = (0.5, 0.95)  # shares of the time that the whole import takes
MOST_S = 1800
TABLES = ("prompts", "responses", "tasks", "aggregate_runs", "aggregates")


def files(arguments: argparse.Namespace) -> None:
    """Import generated files of preferences and of unpaired labels, whole and killed on the way."""
    rows = arguments.rows
    with tempfile.TemporaryDirectory(prefix="headrace-files-") as name:
        folder = Path(name)
        written = {"preferences": preference_rows, "unpaired": unpaired_rows}
        for kind, make in written.items():
            with (folder / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in make(rows))
        print("| file | seconds | of the processor | peak memory more, MiB |\n| --- | ---: | ---: | ---: |", flush=True)
        took_s = {kind: whole(folder, kind) for kind in written}
        print("\n| file | MiB | store, MiB | of its rows | rows of prompts, responses, tasks, runs, aggregates |")
        print("| --- | ---: | ---: | --- | --- |")
        for kind in written:
            sizes = [(folder / ending).stat().st_size / 2**20 for ending in (f"{kind}.jsonl", f"{kind}.db")]
            said = (folder / f"{kind}.report").read_text(encoding="utf-8")
            in_store = ", ".join(map(str, counted(folder, kind)))
            print(f"| {kind} | {sizes[0]:.0f} | {sizes[1]:.0f} | {said} | {in_store} |")
        print("\n| killed (kill -9) | after, s | rows that it left in the store |\n| --- | ---: | --- |")
        for share in KILLED_AT:
            killed(folder, "preferences", share * took_s["preferences"])


def preference_rows(count: int) -> Iterator[dict[str, str]]:
    """Two of each prompt; of a hundred rows one has equal sides and one an empty side."""
    for number in range(count):
        chosen, rejected = (f"{side} answer number {number} to what was asked" for side in ("a good", "a bad"))
        if number % 100 == 1:
            rejected = chosen
        elif number % 100 == 2:
            rejected = " "
        yield {"prompt": f"question number {number // 2}, asked by somebody", "chosen": chosen, "rejected": rejected}


def unpaired_rows(count: int) -> Iterator[dict[str, object]]:
    for number in range(count):
        answer = "" if number % 100 == 1 else f"an answer number {number} to what was asked"
        prompt = f"question number {number // 2}, asked by somebody"
        yield {"prompt": prompt, "completion": answer, "label": number % 3 == 0}


def whole(folder: Path, kind: str) -> float:
    """Seconds of the import, in a process of its own, so that memory is that of this import."""
    began_s = time.perf_counter()
    process = started(imported, folder, kind, f"{kind}.db")
    process.join(MOST_S)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the import of {kind} did not end within {MOST_S} s")
    if process.exitcode:
        raise RuntimeError(f"the import of {kind} failed with {process.exitcode}")
    return time.perf_counter() - began_s


def killed(folder: Path, kind: str, after_s: float) -> None:
    place = f"killed-{kind}-{after_s:.0f}.db"
    process = started(imported, folder, kind, place)
    process.join(after_s)
    process.kill()
    process.join(MOST_S)
    print(f"| {kind} | {after_s:.1f} | {', '.join(map(str, counted(folder, Path(place).stem)))} |", flush=True)


def started(work: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    return process


def imported(folder: Path, kind: str, place: str) -> None:
    with Store(folder / place) as store:
        work = store.import_preferences if kind == "preferences" else store.import_unpaired
        if place != f"{kind}.db":
            work(folder / f"{kind}.jsonl")
            return
        report = timed(f"{kind} in", lambda: work(folder / f"{kind}.jsonl"))
    left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(report.dropped.items()))
    said = f"{report.kept} new, {report.known} there already, left out: {left_out}"
    (folder / f"{kind}.report").write_text(said, encoding="utf-8")


def counted(folder: Path, stem: str) -> list[int]:
    """Rows by table; a store that was killed before its tables were there has none."""
    connection = sqlite3.connect(folder / f"{stem}.db")
    try:
        there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        query = "SELECT count(*) FROM {}"
        return [connection.execute(query.format(table)).fetchone()[0] if table in there else 0 for table in TABLES]
    finally:
        connection.close()
