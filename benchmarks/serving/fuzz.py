"""Requests made by schemathesis from the OpenAPI description, and malformed ones: no 5xx but the 503, nobody dies."""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from benchmarks.serving.malformed import CHAT, Wire, cases
from benchmarks.serving.servers import Server, find_model, headrace, role

_REQUEST_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=int, default=200, help="of each operation, valid and invalid ones")
    parser.add_argument("--repeat", type=int, default=3, help="how often each malformed request is sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-gib", type=float, default=0.5)


def measure(arguments: argparse.Namespace, folder: Path, found: dict[str, Any]) -> int:
    model = find_model(arguments.model, folder)
    replicas = {"kv_cache_gib": arguments.kv_cache_gib, "max_running": 16}
    limits = {"max_response_tokens": 64, "max_body_bytes": 2 << 20}
    with headrace(model, folder / "ours", replicas=replicas, limits=limits) as server:
        before = _processes(server)
        described = _described(server, arguments)
        sent = _malformed(server, arguments)
        after = _processes(server)
        alive = requests.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=_REQUEST_S)
        running = _still_running(server)
    died = {f"{before[pid]} ({pid})" for pid in before.keys() - after.keys()}
    wrong = [*described.wrong, *sent.wrong]
    print("| operation | requests | answers by status |\n| --- | ---: | --- |")
    for name, statuses in described.statuses.items():
        print(f"| {name} | {statuses.total()} | {_counted(statuses)} |")
    print("\n| malformed | answers by status (0: connection closed) |\n| --- | --- |")
    for name, statuses in sent.statuses.items():
        print(f"| {name} | {_counted(statuses)} |")
    total = sum(statuses.total() for each in (described, sent) for statuses in each.statuses.values())
    print("\n| counted | number |\n| --- | ---: |")
    print(f"| requests | {total} |\n| 5xx other than a 503 with Retry-After | {len(wrong)} |")
    print(f"| processes that died | {len(died)} |\n| requests that still run in an engine | {running} |")
    print(f"| status of a request afterwards | {alive.status_code} |")
    for each in wrong[:20]:
        print(f"\nwrong: {each}")
    for name in sorted(died):
        print(f"\ndied: {name}")
    found |= {"wrong": wrong, "died": sorted(died), "requests": total}
    return int(bool(wrong or died or running or alive.status_code != 200))


class Answers:
    """By what was sent: how often which status came, and what should not have come."""

    def __init__(self) -> None:
        self.statuses: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.wrong: list[str] = []

    def add(self, what: str, status: int, *, retry_after: bool, said: str) -> None:
        self.statuses[what][status] += 1
        if status >= 500 and not (status == 503 and retry_after):
            self.wrong.append(f"{what}: {status}: {said}")


def _described(server: Server, arguments: argparse.Namespace) -> Answers:
    """Each operation of the description, with bodies that fit it and bodies that do not."""
    answers = Answers()
    answered = requests.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=_REQUEST_S).json()
    real = {"model": CHAT["model"], "id": answered["id"]}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", timeout=_REQUEST_S)
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result.err()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            names = real if mode is GenerationMode.POSITIVE else {}
            _ask_all(result.ok(), mode, names, arguments, answers)
    return answers


def _ask_all(
    operation: Any, mode: GenerationMode, names: dict[str, str], arguments: argparse.Namespace, answers: Answers
) -> None:
    """`names` are put in place of made-up ones: what names no model and no answer gets no further than that."""
    name = f"{operation.method.upper()} {operation.path}"

    @seed(arguments.seed)
    @settings(
        max_examples=arguments.examples // 2,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body |= {field: value for field, value in names.items() if field in case.body}
        try:
            answer = case.call(timeout=_REQUEST_S)
        except requests.ConnectionError:
            answers.add(name, 0, retry_after=False, said="")
            return
        said = f"{answer.text[:300]} to {case.as_curl_command()[:600]}"
        answers.add(name, answer.status_code, retry_after="Retry-After" in answer.headers, said=said)

    with suppress(Unsatisfiable):  # nothing invalid can be made for an operation that takes nothing
        ask()


def _malformed(server: Server, arguments: argparse.Namespace) -> Answers:
    answers, wire = Answers(), Wire(server.url)
    for name, send in cases():
        for _ in range(arguments.repeat):
            said = send(wire)
            answers.add(name, said.status, retry_after=said.retry_after, said=said.body[-300:].decode("latin-1"))
    return answers


def _processes(server: Server) -> dict[int, str]:
    """What runs, by process id; the workers that Ray keeps ready for later come and go."""
    found = {}
    for process in server.processes.alive():
        try:
            found[process.pid] = role(process)
        except psutil.Error:
            continue
    return {pid: what for pid, what in found.items() if what not in ("other", "other of Ray")}


def _still_running(server: Server) -> int:
    """Requests in the engines once everybody has left: what was abandoned has to be aborted."""
    expires = time.monotonic() + _REQUEST_S
    while True:
        running = sum(row["running"] for row in server.get("/v1/versions")["status"]["replicas"])
        if not running or time.monotonic() > expires:
            return int(running)
        time.sleep(1.0)


def _counted(statuses: Counter[int]) -> str:
    return ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items()))
