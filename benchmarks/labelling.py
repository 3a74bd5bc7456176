"""Many annotators at once on the labelling API, on a real Ray Serve: is any vote lost, doubled or misassigned?

    python -m benchmarks.labelling [--annotators 50] [--pairs 200] [--votes 5] [--lost 0.1] [--seed 0] [--store URL]

Each simulated annotator asks for tasks and votes until nothing is left for them, without pause. Some requests are sent
again although they were answered (as after a lost answer), some votes are sent twice at the same time, some are undone
and given again. The store is a new SQLite file, or with --store the empty database of a PostgreSQL, which keeps
everything. Afterwards the database is read and held against what each annotator saw, meant and was told. Prints
Markdown; ends with status 1 where a count is not 0.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cluster.loopback import stay_on_loopback

stay_on_loopback()

import httpx  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402
from sqlalchemy import create_engine, text  # noqa: E402

from contracts.labelling import LabellingConfig  # noqa: E402
from feedback.store import Refused, Store  # noqa: E402
from serving.labelling import build  # noqa: E402

CHOICES = ("left", "right", "tie", "both_bad")
REQUEST_S, START_S = 120.0, 180.0


@dataclass
class Said:
    """What an annotator meant by a vote, and what the API acknowledged."""

    annotator_id: int
    task_id: str
    choice: str  # in the store's terms, from the texts that were on the screen
    shown_left: str
    judgment_id: int
    undone: bool = False


@dataclass
class Panel:
    """All that was said, how long each request took, and answers that were refused, by status and code."""

    said: list[Said] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"next": [], "judgments": [], "undo": []})
    refused: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    different: int = 0  # receipts that changed when the same vote was sent again


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--votes", type=int, default=5, help="required of each pair")
    parser.add_argument("--lost", type=float, default=0.1, help="share of votes sent again, undone, sent twice at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--store", metavar="URL", help="an empty database, postgresql+psycopg://...; default: a file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="labelling-") as folder:
        place = arguments.store or f"sqlite:///{folder}/feedback.db"
        try:
            people = prepared(place, arguments)
        except (Refused, ValueError) as refused:
            parser.error(f"--store: {refused}")
        began_s = time.perf_counter()
        ray.init("local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
        try:
            serve.start(proxy_location="Disabled")
            config = LabellingConfig(store=place, gold_rate=0.1, port=arguments.port)
            serve.run(build(config), name="headrace-labelling", route_prefix=None)
            print(f"Ray Serve was ready after {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
            panel, wall_s = asyncio.run(labelled(f"http://127.0.0.1:{arguments.port}", people, arguments))
        finally:
            serve.shutdown()
            ray.shutdown()
        faults = held_against(place, panel, arguments)
    show(panel, faults, wall_s, arguments)
    return int(any(faults.values()))


def prepared(place: str, arguments: argparse.Namespace) -> list[tuple[int, str]]:
    """A store with pairs, every tenth more a gold check; (annotator id, token) of everybody.

    Raises:
        Refused: it is no store.
        ValueError: it is somebody's; all votes in it are counted afterwards.
    """
    with Store(place) as store:
        if store.everybody():
            raise ValueError("there are annotators in it already: give an empty database")
        for number in range(arguments.pairs + arguments.pairs // 10):
            prompt = store.add_prompt(f"question {number}", name=str(number))
            sides = [store.add_response(prompt, f"{side} {number}", source="versions") for side in "ab"]
            gold = "a" if number >= arguments.pairs else None
            store.add_task("pair", *sides, required_votes=arguments.votes, gold=gold)
        return [store.register(f"annotator {number}") for number in range(arguments.annotators)]


async def labelled(url: str, people: list[tuple[int, str]], arguments: argparse.Namespace) -> tuple[Panel, float]:
    panel = Panel()
    limits = httpx.Limits(max_connections=2 * len(people))
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_S, limits=limits) as client:
        began_s = time.perf_counter()
        await asyncio.gather(
            *(
                Annotator(client, panel, *person, random.Random(f"{arguments.seed} {person[0]}"), arguments.lost).work()
                for person in people
            )
        )
        return panel, time.perf_counter() - began_s


@dataclass
class Annotator:
    client: httpx.AsyncClient
    panel: Panel
    annotator_id: int
    token: str
    rng: random.Random
    lost: float

    async def work(self) -> None:
        while (task := (await self.send("next"))["task"]) is not None:
            await self.vote(task)

    async def vote(self, task: dict[str, Any]) -> None:
        side = self.rng.choice(CHOICES)
        left, right = (response["text"].split()[0] for response in task["responses"])
        body = {
            "task_id": task["task_id"],
            "lease_id": task["lease_id"],
            "idempotency_key": self.rng.randbytes(8).hex(),
            "choice": side,
        }
        receipt = await self.sent_twice(body) if self.rng.random() < self.lost else await self.send("judgments", body)
        meant = {"left": left, "right": right}.get(side, side)
        said = Said(self.annotator_id, task["task_id"], meant, left, receipt["judgment_id"])
        self.panel.said.append(said)
        if self.rng.random() < self.lost:
            again = await self.send("judgments", body)
            self.panel.repeated += 1
            self.panel.different += again != receipt | {"repeated": True}
        if self.rng.random() < self.lost:
            key = {"idempotency_key": self.rng.randbytes(8).hex()}
            back = await self.send("undo", key, path=f"judgments/{said.judgment_id}/undo")
            said.undone = True
            await self.vote(back["task"])

    async def sent_twice(self, body: dict[str, Any]) -> dict[str, Any]:
        """The same vote in two requests at once, as a double click would: one of them is a repetition."""
        one, other = await asyncio.gather(self.send("judgments", body), self.send("judgments", body))
        first, second = sorted((one, other), key=lambda receipt: receipt["repeated"])
        self.panel.repeated += 1
        self.panel.different += second != first | {"repeated": True}
        return first

    async def send(self, kind: str, body: dict[str, Any] | None = None, *, path: str = "") -> dict[str, Any]:
        began_s = time.perf_counter()
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = await self.client.post(f"/api/{path or kind}", json=body, headers=headers)
        self.panel.seconds[kind].append(time.perf_counter() - began_s)
        found: dict[str, Any] = answer.json()
        if answer.is_error:
            self.panel.refused[f"{answer.status_code} {found['error']['code']}"] += 1
            raise RuntimeError(f"{kind} was refused: {found['error']['message']}")
        return found


def held_against(place: str, panel: Panel, arguments: argparse.Namespace) -> dict[str, int]:
    """How many votes went wrong, by way of going wrong, read from the database itself."""
    engine = create_engine(place)
    with engine.connect() as connection:

        def rows(query: str) -> list[tuple[Any, ...]]:
            return [tuple(row) for row in connection.execute(text(query))]

        votes_kept = "SELECT id, annotator_id, task_id, choice, shown_left FROM judgments WHERE act = 'vote'"
        kept = {row[0]: row[1:] for row in rows(votes_kept)}
        undone = {row[0] for row in rows("SELECT supersedes FROM judgments WHERE act = 'undo'")}
        tasks = {row[0]: row[1:] for row in rows("SELECT id, required_votes, votes FROM tasks WHERE gold IS NULL")}
    engine.dispose()
    told = {said.judgment_id: said for said in panel.said}
    standing = [row for judgment_id, row in kept.items() if judgment_id not in undone]
    votes = Counter(task_id for _, task_id, _, _ in standing)
    a_person = Counter((annotator_id, task_id) for annotator_id, task_id, _, _ in standing)
    return {
        "lost: acknowledged, not in the store": len(told.keys() - kept.keys()),
        "never acknowledged, in the store": len(kept.keys() - told.keys()),
        "doubled: more than one standing vote of a person on a task": sum(count > 1 for count in a_person.values()),
        "misassigned: person, task, choice or side is not what was meant": sum(
            kept[number] != (said.annotator_id, said.task_id, said.choice, said.shown_left)
            for number, said in told.items()
            if number in kept
        ),
        "undone and still standing, or the other way round": len(
            undone ^ {number for number, said in told.items() if said.undone}
        ),
        "receipts that changed when a vote was sent again": panel.different,
        "tasks with more votes than required": sum(votes[task] > required for task, (required, _) in tasks.items()),
        "tasks with fewer, although annotators were enough": sum(
            votes[task] < min(required, arguments.annotators) for task, (required, _) in tasks.items()
        ),
        "tasks whose counted votes are not those in the store": sum(votes[task] != n for task, (_, n) in tasks.items()),
    }


def show(panel: Panel, faults: dict[str, int], wall_s: float, arguments: argparse.Namespace) -> None:
    requests = sum(map(len, panel.seconds.values()))
    options = [word.replace(arguments.store or "\0", "URL") for word in sys.argv[1:]]  # a URL may hold a password
    print(f"`{' '.join(['python -m benchmarks.labelling', *options])}`, {os.cpu_count()} cores\n")
    database = "PostgreSQL" if arguments.store else "SQLite"
    print(
        f"{arguments.annotators} annotators at once, {database}, {len(panel.said)} votes ({panel.repeated} sent twice, "
        f"{sum(said.undone for said in panel.said)} undone) in {wall_s:.1f} s: "
        f"{len(panel.said) / wall_s:.0f} votes/s, {requests / wall_s:.0f} requests/s\n"
    )
    print("| request | number | median, s | 99 %, s | largest, s |\n| --- | ---: | ---: | ---: | ---: |")
    for kind, seconds in panel.seconds.items():
        if len(seconds) > 1:
            late = statistics.quantiles(seconds, n=100)[98]
            print(f"| {kind} | {len(seconds)} | {statistics.median(seconds):.3f} | {late:.3f} | {max(seconds):.3f} |")
    print("\n| what went wrong | number |\n| --- | ---: |")
    for what, number in faults.items():
        print(f"| {what} | {number} |")


if __name__ == "__main__":
    sys.exit(main())
