"""Five times what the server can do: how much it still does, how fast it refuses, and whether its memory stays flat."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.client import Client, Told, chat, client, percentile, question
from benchmarks.serving.servers import Server, find_model, headrace, role

REQUEST_S = 120.0
_SAMPLE_S = 1.0
_GROWTH = 0.05  # of a process's memory, from the first third of the overload to its last
_GROWTH_BYTES = 20 << 20


class Memory:
    """Resident bytes of each process of the server, once a second."""

    def __init__(self, server: Server) -> None:
        self._processes = {f"{role(process)} ({process.pid})": process for process in server.processes.alive()}
        self.samples: defaultdict[str, list[int]] = defaultdict(list)

    async def watch(self) -> None:
        while True:
            for name, process in self._processes.items():
                try:
                    self.samples[name].append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    self.samples[name].append(0)
            await asyncio.sleep(_SAMPLE_S)

    def died(self) -> list[str]:
        return [name for name, sizes in self.samples.items() if sizes[-1] == 0]

    def grown(self) -> list[str]:
        """Those whose median is larger in the last third than in the first, by more than noise."""
        found = []
        for name, sizes in self.samples.items():
            first, last = sizes[: len(sizes) // 3], sizes[-(len(sizes) // 3) :]
            before, after = percentile(first, 0.5), percentile(last, 0.5)
            if after - before > max(_GROWTH_BYTES, _GROWTH * before):
                found.append(name)
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=float, default=5.0, help="requests a second, of what it can do")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--peak-streams", type=int, nargs="+", default=[16, 32, 64], help="tried for the peak")
    parser.add_argument("--peak-seconds", type=float, default=20.0, help="each")
    parser.add_argument("--running", type=int, default=32, help="serving.replicas.max_running")
    parser.add_argument("--waiting", type=int, default=32, help="serving.limits.max_waiting")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=None, help="of the engine; default: all cores")


def measure(arguments: argparse.Namespace, folder: Path, found: dict[str, Any]) -> int:
    model = find_model(arguments.model, folder)
    replicas = {"max_running": arguments.running, "kv_cache_gib": arguments.kv_cache_gib}
    limits = {"max_waiting": arguments.waiting}
    with headrace(model, folder / "ours", threads=arguments.threads, replicas=replicas, limits=limits) as server:
        peaks, told, memory, after = asyncio.run(_measured(server, arguments))
    peak = max(peaks.values())
    answered = [each for each in told if each.whole]
    refused = [each for each in told if each.status == 503 and each.retry_after is not None]
    lost = [each for each in told if not each.whole and each not in refused]
    seconds = arguments.seconds
    began = min(each.sent for each in told)
    # What was let in at the end is answered after it: of those counts what ended within the time.
    tokens = sum(each.tokens for each in answered if each.ended <= began + seconds)
    share = tokens / seconds / peak
    grown = memory.grown()
    print("| streams at a time | tokens/s |\n| ---: | ---: |")
    for streams, rate in peaks.items():
        print(f"| {streams} | {rate:.0f} |")
    print(
        f"\n{len(told)} requests in {seconds:.0f} s, {arguments.times:g} times the peak of {peak:.0f} tokens/s: "
        f"{tokens / seconds:.0f} tokens/s, **{share:.1%} of the peak**\n"
    )
    print("| requests | number | p50, s | p99, s | largest, s |\n| --- | ---: | ---: | ---: | ---: |")
    for name, some in (
        ("answered", answered),
        ("refused with 503 and Retry-After", refused),
        ("anything else", lost),
    ):
        took = [each.seconds for each in some]
        values = (percentile(took, 0.5), percentile(took, 0.99), max(took, default=float("nan")))
        print(f"| {name} | {len(some)} | {' | '.join(f'{value:.3f}' for value in values)} |")
    for (status, error), number in Counter((each.status, each.error[:100]) for each in lost).most_common(5):
        print(f"\nelse: {number} times status {status}: {error}")
    print("\n| memory of | first, MiB | half-way | last | largest |\n| --- | ---: | ---: | ---: | ---: |")
    for name, sizes in sorted(memory.samples.items(), key=lambda item: -max(item[1])):
        sampled = (sizes[0], sizes[len(sizes) // 2], sizes[-1], max(sizes))
        print(f"| {name} | {' | '.join(f'{value / 2**20:.0f}' for value in sampled)} |")
    print(f"\ngrown by more than noise: {', '.join(grown) or 'none'}; died: {', '.join(memory.died()) or 'none'}")
    print(f"after it one request took {after.seconds:.2f} s, status {after.status}")
    found |= {
        "peak_tokens_per_s": peaks,
        "tokens_per_s": tokens / seconds,
        "share": share,
        "answered_s": [each.seconds for each in answered],
        "refused_s": [each.seconds for each in refused],
        "lost": [each.error for each in lost],
        "rss_bytes": dict(memory.samples),
    }
    return int(bool(lost or memory.died() or not after.whole))


async def _measured(server: Server, arguments: argparse.Namespace) -> tuple[dict[int, float], list[Told], Memory, Told]:
    numbers = iter(range(10**9))
    async with client(server.url, timeout_s=REQUEST_S) as asking:
        await asking.all([chat(question(next(numbers)), tokens=4) for _ in range(16)], streams=8)
        peaks = {}
        rate = 0.0
        for streams in arguments.peak_streams:
            peaks[streams] = await _closed(asking, streams, numbers, arguments)
            rate = max(peaks.values()) / arguments.tokens
        memory = Memory(server)
        watching = asyncio.create_task(memory.watch())
        told = await _open(asking, arguments.times * rate, numbers, arguments)
        watching.cancel()
        after = await asking.ask(chat(question(next(numbers)), tokens=4))
    return peaks, told, memory, after


async def _closed(asking: Client, streams: int, numbers: Any, arguments: argparse.Namespace) -> float:
    """Tokens/s with so many requests at any time, once all of the first have been answered."""
    told: list[Told] = []
    expires = time.monotonic() + arguments.peak_seconds

    async def work() -> None:
        while time.monotonic() < expires:
            told.append(await asking.ask(chat(question(next(numbers)), tokens=arguments.tokens)))

    began = time.monotonic()
    await asyncio.gather(*(work() for _ in range(streams)))
    assert all(each.whole for each in told), [each.error for each in told if not each.whole][:3]
    return sum(each.tokens for each in told) / (max(each.ended for each in told) - began)


async def _open(asking: Client, rate: float, numbers: Any, arguments: argparse.Namespace) -> list[Told]:
    """`rate` requests a second, whatever becomes of the earlier ones."""
    began, asked = time.monotonic(), list[asyncio.Task[Told]]()
    while (passed_s := time.monotonic() - began) < arguments.seconds:
        while len(asked) <= passed_s * rate:
            body = chat(question(next(numbers)), tokens=arguments.tokens)
            asked.append(asyncio.create_task(asking.ask(body)))
        await asyncio.sleep(min(0.05, 1 / rate))
    return list(await asyncio.gather(*asked))
