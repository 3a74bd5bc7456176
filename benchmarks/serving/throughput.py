"""Tokens a second and seconds to the first token, ours and vLLM's own server in turn, and what costs it."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve

from benchmarks.serving.client import Client, Told, chat, client, percentile, question
from benchmarks.serving.servers import NAME, Server, find_model, headrace, vllm_server
from contracts.waiting import answer
from serving.records import LIVE, PolicyRequest

REQUEST_S = 240.0
OURS, THEIRS = "headrace serve", "vLLM's server"


@dataclass
class Measured:
    """All rounds of one server at one number of streams."""

    told: list[Told] = field(default_factory=list)
    wall_s: float = 0.0
    rates: list[float] = field(default_factory=list)  # tokens/s, one a round
    cpu_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    idle_cpu_s: float = 0.0  # of the other server, meanwhile

    @property
    def tokens(self) -> int:
        return sum(told.tokens for told in self.told)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="of each server, in turn")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--requests", type=int, default=2, help="a stream and round; at one stream six times as many")
    parser.add_argument("--hops", type=int, default=40, help="requests one at a time over each part of the way")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=None, help="of an engine; default: all cores")


def measure(arguments: argparse.Namespace, folder: Path, found: dict[str, Any]) -> int:
    model = find_model(arguments.model, folder)
    most = max(arguments.streams)
    replicas = {"max_running": most, "kv_cache_gib": arguments.kv_cache_gib}
    same = {"max_running": most, "kv_cache_gib": arguments.kv_cache_gib, "threads": arguments.threads}
    limits = {"max_waiting": most}
    with (
        headrace(model, folder / "ours", threads=arguments.threads, replicas=replicas, limits=limits) as ours,
        vllm_server(model, folder / "theirs", **same) as theirs,
    ):
        servers = {OURS: ours, THEIRS: theirs}
        cells = asyncio.run(_rounds(servers, arguments))
        hops = asyncio.run(_hops(servers, arguments.hops)) if arguments.hops else {}
    failed = [told for cell in cells.values() for told in cell.told if not told.whole or not told.tokens]
    _show(cells, hops, arguments)
    found |= {
        "cells": [
            {
                "server": server,
                "streams": streams,
                "requests": len(cell.told),
                "tokens": cell.tokens,
                "tokens_per_s": cell.tokens / cell.wall_s,
                "tokens_per_s_rounds": cell.rates,
                "first_token_s": sorted(told.first_token_s for told in cell.told),
                "cpu_s": dict(cell.cpu_s),
                "idle_cpu_s": cell.idle_cpu_s,
                "wall_s": cell.wall_s,
            }
            for (server, streams), cell in cells.items()
        ],
        "hops_s": hops,
        "failed": [told.error for told in failed],
    }
    for told in failed[:5]:
        print(f"\nfailed: status {told.status}, {told.tokens} tokens: {told.error}")
    return int(bool(failed))


async def _rounds(servers: dict[str, Server], arguments: argparse.Namespace) -> dict[tuple[str, int], Measured]:
    cells: dict[tuple[str, int], Measured] = defaultdict(Measured)
    number = 0
    for server in servers.values():  # the first answers of a process are slow
        async with client(server.url, timeout_s=REQUEST_S) as warm:
            await warm.all([chat(question(n), tokens=8) for n in range(2 * max(arguments.streams))], streams=8)
    for round_number in range(arguments.rounds):
        for streams in arguments.streams:
            count = arguments.requests * (6 if streams == 1 else streams)
            bodies = [chat(question(number := number + 1), tokens=arguments.tokens) for _ in range(count)]
            order = list(servers) if round_number % 2 == 0 else list(servers)[::-1]
            for name in order:
                await _one_round(servers, name, bodies, streams, cells[name, streams])
    return cells


async def _one_round(
    servers: dict[str, Server], name: str, bodies: list[dict[str, Any]], streams: int, cell: Measured
) -> None:
    (other,) = (server for each, server in servers.items() if each != name)
    cpu, other_cpu = servers[name].cpu_s(), sum(other.cpu_s().values())
    began = time.monotonic()
    async with client(servers[name].url, timeout_s=REQUEST_S) as asking:
        told = await asking.all(bodies, streams=streams)
    wall_s = time.monotonic() - began
    cell.idle_cpu_s += sum(other.cpu_s().values()) - other_cpu
    for what, used in servers[name].cpu_s().items():
        cell.cpu_s[what] += used - cpu.get(what, 0.0)
    cell.told += told
    cell.wall_s += wall_s
    cell.rates.append(sum(each.tokens for each in told) / wall_s)


async def _hops(servers: dict[str, Server], count: int) -> dict[str, list[float]]:
    """Seconds of single requests over ever more of the way, each kind in turn: the differences are the parts."""
    ray.init(address=servers[OURS].ray_address, log_to_driver=False)
    try:
        live = serve.get_deployment_handle(LIVE, f"headrace-serving-{NAME}").options(stream=True, method_name="answer")
        seconds: dict[str, list[float]] = defaultdict(list)
        async with (
            client(servers[OURS].url, timeout_s=REQUEST_S) as ours,
            client(servers[THEIRS].url, timeout_s=REQUEST_S) as theirs,
        ):
            ways: dict[str, Callable[[dict[str, Any]], Awaitable[float]]] = {
                "GET /health of ours: the ingress, no engine": lambda _: _seconds_of_get(ours, "/health"),
                "a replica of ours through Serve's handle: first bytes": lambda body: _through_handle(live, body),
                "ours over HTTP: first token": lambda body: _first_token(ours, body),
                "vLLM's server over HTTP: first token": lambda body: _first_token(theirs, body),
            }
            for number in range(count):
                body = chat(question(100_000 + number), tokens=4)
                for name, way in ways.items():
                    took_s = await way(body)
                    if number >= 3:  # handles and connections are made in the first
                        seconds[name].append(took_s)
        return dict(seconds)
    finally:
        ray.shutdown()


async def _first_token(asking: Client, body: dict[str, Any]) -> float:
    return (await asking.ask(body)).first_token_s


async def _seconds_of_get(asking: Client, path: str) -> float:
    began = time.monotonic()
    await asking.get(path)
    return time.monotonic() - began


async def _through_handle(live: Any, body: dict[str, Any]) -> float:
    """Head and first bytes of the answer; the rest is read too, so that nothing is left running."""
    request = PolicyRequest("chat", body, f"hop-{time.monotonic_ns()}", REQUEST_S)
    began = time.monotonic()
    parts = live.remote(request)
    await answer(anext(parts), who="a replica", asked="begin", deadline_s=REQUEST_S)
    await answer(anext(parts), who="a replica", asked="begin", deadline_s=REQUEST_S)
    took_s = time.monotonic() - began
    while True:
        try:
            await answer(anext(parts), who="a replica", asked="go on", deadline_s=REQUEST_S)
        except StopAsyncIteration:
            return took_s


def _show(cells: dict[tuple[str, int], Measured], hops: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    print(
        "| streams | server | tokens/s (each round) | of vLLM's | first token, ms: median | p99 | added | answers |\n"
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for streams in arguments.streams:
        theirs = cells[THEIRS, streams]
        base_ms = 1000 * statistics.median(told.first_token_s for told in theirs.told)
        for name in (OURS, THEIRS):
            cell = cells[name, streams]
            first_ms = [1000 * told.first_token_s for told in cell.told]
            median_ms, rate = statistics.median(first_ms), cell.tokens / cell.wall_s
            added = f"{median_ms - base_ms:+.1f}"
            rounds = " ".join(f"{each:.0f}" for each in cell.rates)
            print(
                f"| {streams} | {name} | {rate:.1f} ({rounds}) | {rate * theirs.wall_s / theirs.tokens:.1%} "
                f"| {median_ms:.1f} | {percentile(first_ms, 0.99):.1f} | {added} | {len(cell.told)} |"
            )
    print("\n| streams | server | ms of CPU a token, by process | the idle server beside it, of a core |")
    print("| ---: | --- | --- | ---: |")
    for (name, streams), cell in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        parts = sorted(cell.cpu_s.items(), key=lambda item: -item[1])
        told = [f"{what} {1000 * used / cell.tokens:.2f}" for what, used in parts if used > 0.01 * cell.wall_s]
        print(f"| {streams} | {name} | {', '.join(told)} | {cell.idle_cpu_s / cell.wall_s:.1%} |")
    if hops:
        print("\n| one request at a time | ms: median | p90 |\n| --- | ---: | ---: |")
        for what, seconds in hops.items():
            print(f"| {what} | {1000 * statistics.median(seconds):.1f} | {1000 * percentile(seconds, 0.9):.1f} |")
