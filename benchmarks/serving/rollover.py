"""Requests while versions roll over and a replica is killed: whose weights wrote each answer, and what failed."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.serve.context import _get_global_client
from transformers import AutoTokenizer

from actors.delivery import Published
from benchmarks.serving.client import Client, Told, chat, client, percentile, question
from benchmarks.serving.marks import Marks
from benchmarks.serving.servers import NAME, Model, Server, find_model, headrace
from cluster.serving import ServingLink, find_keeper
from contracts.events import Event
from contracts.records import WeightsUpdate
from contracts.serving import ServingConfig
from contracts.waiting import answer
from models.engine_shadow import policy_tensors
from models.weight_stream import DeltaSender
from serving.archive import weights_key

REQUEST_S, ROLL_S, KEEPER_S = 150.0, 240.0, 60.0
_LOOK_S = 0.2
_PROMPTS = 64
_REPLICAS = 2


@dataclass
class Roll:
    """A version on its way, on this process's monotonic clock: until each replica that lived served it."""

    version: int
    begun: float
    done: float = math.inf


@dataclass
class Course:
    """What happened beside the requests."""

    rolls: list[Roll] = field(default_factory=list)
    killed: str = ""  # the replica
    killed_at: float = math.inf
    replaced_s: float = math.nan
    events: list[Event] = field(default_factory=list)

    def versions(self, sent: float, ended: float) -> range:
        """Those that a replica may have served in between: from the last that all served to the newest published."""
        oldest = max((roll.version for roll in self.rolls if roll.done <= sent), default=0)
        newest = max((roll.version for roll in self.rolls if roll.begun <= ended), default=0)
        return range(oldest, newest + 1)

    def rolls_within(self, sent: float, ended: float) -> bool:
        return any(roll.begun <= ended and sent <= roll.done for roll in self.rolls)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=2000, help="at least; the load lasts as long as the versions")
    parser.add_argument("--versions", type=int, default=50)
    parser.add_argument("--streams", type=int, default=8, help="requests at a time, every other one is streamed")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds from the end of a rollover to the next")
    parser.add_argument("--kv-cache-gib", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1, help="of each of the two engines")


def measure(arguments: argparse.Namespace, folder: Path, found: dict[str, Any]) -> int:
    model = find_model(arguments.model, folder)
    replicas = {"min_replicas": _REPLICAS, "max_replicas": _REPLICAS, "kv_cache_gib": arguments.kv_cache_gib}
    with headrace(model, folder / "ours", threads=arguments.threads, replicas=replicas) as server:
        ray.init(address=server.ray_address, log_to_driver=False)
        try:
            told, course, marks, paths = asyncio.run(_measured(server, model, arguments))
        finally:
            ray.shutdown()
    faults = faults_of(told, course, marks, paths)
    faults["versions that training could not hand over"] = len(course.events)
    _show(told, course, faults)
    wrong = [
        _described(each, course, marks, paths) for each in told if each.whole and _is_wrong(each, course, marks, paths)
    ]
    for each in wrong[:10]:
        print(f"\nwrong: {each}")
    found |= {
        "faults": faults,
        "rolls": [asdict(roll) for roll in course.rolls],
        "killed_at": course.killed_at,
        "replaced_s": course.replaced_s,
        "events": [asdict(event) for event in course.events],
        "wrong": wrong,
        "requests": [
            {"sent": each.sent, "first": each.first, "ended": each.ended, "streamed": each.streamed}
            | {"status": each.status, "version": each.version, "error": each.error}
            for each in told
        ],
    }
    return int(any(number for what, number in faults.items() if what not in _APART))


async def _measured(
    server: Server, model: Model, arguments: argparse.Namespace
) -> tuple[list[Told], Course, Marks, dict[str, list[int]]]:
    prompts = [question(number) for number in range(_PROMPTS)]
    course = Course()
    async with client(server.url, timeout_s=REQUEST_S, keep=True) as asking:
        marks, paths = await _marks(asking, prompts, model, arguments)
        trainer = Trainer(model, marks, server.run_dir / "serving", course)
        conducting = asyncio.create_task(_conduct(trainer, course, arguments))
        bodies = _bodies(prompts, conducting, arguments)
        told = await asking.all(bodies, streams=arguments.streams)
        await answer(conducting, who="the versions", asked="roll over", deadline_s=ROLL_S)
    return told, course, marks, paths


def _bodies(
    prompts: list[str], conducting: asyncio.Task[None], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        if number >= arguments.requests and conducting.done():
            return
        prompt = prompts[number % len(prompts)]
        yield chat(prompt, tokens=arguments.tokens, stream=number % 2 == 0, return_token_ids=True)


async def _marks(
    asking: Client, prompts: list[str], model: Model, arguments: argparse.Namespace
) -> tuple[Marks, dict[str, list[int]]]:
    """Names for the versions, from what version 0 says to each prompt."""
    bodies = [chat(prompt, tokens=arguments.tokens, stream=False, return_token_ids=True) for prompt in prompts]
    told = await asking.all(bodies, streams=arguments.streams)
    assert all(each.whole for each in told), [each.error for each in told if not each.whole]
    tokenizer: Any = await asyncio.to_thread(AutoTokenizer.from_pretrained, model.folder)
    reserved = {*tokenizer.all_special_ids, *itertools.chain(*(each.objects[0]["prompt_token_ids"] for each in told))}
    paths = {each.prompt: _tokens(each) for each in told}
    said = Counter(itertools.chain(*paths.values()))
    return Marks(said, reserved, vocabulary=len(tokenizer), versions=arguments.versions), paths


class Trainer:
    """Publishes versions as training does: signed deltas, through the keeper of the application."""

    def __init__(self, model: Model, marks: Marks, folder: Path, course: Course) -> None:
        self._marks = marks
        self._base = policy_tensors(model.folder, "bfloat16")
        self._sender = DeltaSender(key=weights_key(folder))
        self._sender.seed(self._base.items(), 0)
        config = ServingConfig(name=NAME)
        self.link = ServingLink(
            lambda: find_keeper(config, deadline_s=KEEPER_S),
            self._keyframe,
            deadline_s=KEEPER_S,
            on_event=course.events.append,
        )

    async def publish(self, version: int) -> None:
        self.link.publish(await asyncio.to_thread(self._made, version))
        await self.link.finish()

    def _made(self, version: int) -> Published:
        base_version = self._sender.next_base
        tensors = self._marks.weights(self._base, version)
        return self._put(list(self._sender.encode(tensors.items(), version)), base_version)

    async def _keyframe(self) -> Published:
        return await asyncio.to_thread(lambda: self._put(list(self._sender.keyframe()), None))

    def _put(self, frames: list[memoryview], base_version: int | None) -> Published:
        assert self._sender.version is not None
        update = WeightsUpdate(
            version=self._sender.version,
            base_version=base_version,
            num_bytes=sum(map(len, frames)),
            digest=self._sender.digest,
            dense_bytes=self._sender.dense_bytes,
            num_frames=len(frames),
            fingerprint=self._sender.fingerprint,
        )
        return update, [ray.put(np.frombuffer(frame, np.uint8)) for frame in frames]


async def _conduct(trainer: Trainer, course: Course, arguments: argparse.Namespace) -> None:
    """The versions one after the other, and in the middle of the middle one a kill."""
    keeper = await find_keeper(ServingConfig(name=NAME), deadline_s=KEEPER_S)
    for version in range(1, arguments.versions + 1):
        roll = Roll(version, time.monotonic())
        course.rolls.append(roll)
        await trainer.publish(version)
        if version == (arguments.versions + 1) // 2:
            await _kill_one(course)
        await _until_served(keeper, version, course)
        roll.done = time.monotonic()
        await asyncio.sleep(arguments.pause)
    expires = time.monotonic() + ROLL_S
    while math.isnan(course.replaced_s) and time.monotonic() < expires:  # the replacement serves under load too
        await _until_served(keeper, arguments.versions, course)
        await asyncio.sleep(_LOOK_S)


async def _until_served(keeper: Any, version: int, course: Course) -> None:
    expires = time.monotonic() + ROLL_S
    while True:
        status = await answer(keeper.status.remote(), who="the keeper", asked="say who serves", deadline_s=KEEPER_S)
        rows = [row for row in status["replicas"] if row["replica"] != course.killed]
        serving = [row for row in rows if row["state"] != "starting"]
        if course.killed and len(serving) == _REPLICAS and math.isnan(course.replaced_s):
            course.replaced_s = time.monotonic() - course.killed_at
        if serving and all(row["version"] == version and row["state"] == "serving" for row in serving):
            return
        if time.monotonic() > expires:
            raise TimeoutError(f"version {version} is not served by all after {ROLL_S:g} s: {status}")
        await asyncio.sleep(_LOOK_S)


def _details() -> dict[str, Any]:
    controller = _get_global_client()
    assert controller is not None
    found: dict[str, Any] = controller.get_serve_details()
    return found


async def _kill_one(course: Course) -> None:
    """kill -9 of the process of one of the replicas; its engine core ends with it."""
    found = await answer(
        asyncio.to_thread(_details), who="Ray Serve", asked="say where replicas run", deadline_s=KEEPER_S
    )
    live = found["applications"][f"headrace-serving-{NAME}"]["deployments"]["live"]["replicas"]
    victim = next(each for each in live if each["state"] == "RUNNING")
    course.killed, course.killed_at = victim["replica_id"], time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)


def _tokens(told: Told) -> list[int]:
    """The response's, of a document or of all its events."""
    choices = itertools.chain(*(found["choices"] for found in told.objects))
    return list(itertools.chain(*(choice.get("token_ids") or () for choice in choices)))


# Counted, and no fault.
_APART = (
    "streams that were running on the killed replica, and were told so",
    "answers without a token that names a version",
)


def faults_of(told: list[Told], course: Course, marks: Marks, paths: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many went wrong, by way of going wrong; `paths` is what version 0 answers to each prompt."""
    counts = Counter[str]()
    for each in told:
        if not each.whole:
            on_the_killed = each.streamed and each.status == 200 and each.sent <= course.killed_at <= each.ended
            counts[_APART[0] if on_the_killed else "failed requests"] += 1
            continue
        labels = {found["weights_version"] for found in each.objects} | {each.version}
        signed = marks.signed(_tokens(each), paths[each.prompt])
        counts["mixed answers: more than one version wrote it, or is named in it"] += len(signed) > 1 or len(labels) > 1
        counts["wrong versions: the label is not the version that wrote it"] += bool(signed) and signed != labels
        counts["wrong versions: not one that was served when it was asked for"] += not labels <= set(
            course.versions(each.sent, each.ended)
        )
        counts[_APART[1]] += not signed
    names = [
        "wrong versions: the label is not the version that wrote it",
        "wrong versions: not one that was served when it was asked for",
        "mixed answers: more than one version wrote it, or is named in it",
        "failed requests",
        *_APART,
    ]
    return {name: counts[name] for name in names}


def _is_wrong(told: Told, course: Course, marks: Marks, paths: Mapping[str, Sequence[int]]) -> bool:
    return any(number for what, number in faults_of([told], course, marks, paths).items() if what not in _APART)


def _described(told: Told, course: Course, marks: Marks, paths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    signed = sorted(marks.signed(_tokens(told), paths[told.prompt]))
    might = course.versions(told.sent, told.ended)
    return {"label": told.version, "signed": signed, "served meanwhile": [might.start, might.stop - 1]}


def _show(told: list[Told], course: Course, faults: dict[str, int]) -> None:
    wall_s = max(each.ended for each in told) - min(each.sent for each in told)
    tokens = sum(each.tokens for each in told)
    print(
        f"{len(told)} requests in {wall_s:.0f} s ({tokens / wall_s:.0f} tokens/s), {len(course.rolls)} versions, "
        f"a replica killed in the middle of version {(len(course.rolls) + 1) // 2}'s rollover, "
        f"replaced after {course.replaced_s:.0f} s\n"
    )
    print("| counted | number |\n| --- | ---: |")
    for what, number in faults.items():
        print(f"| {what} | {number} |")
    rolling = {True: "during rollovers", False: "outside of them"}
    print("\n| answers | number | p50, s | p99, s | first token of streams: p50, s | p99, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for within, name in rolling.items():
        some = [each for each in told if each.whole and course.rolls_within(each.sent, each.ended) == within]
        if not some:
            continue
        whole_s = [each.seconds for each in some]
        first_s = [each.first_token_s for each in some if each.streamed and not math.isnan(each.first)]
        values = (f"{percentile(of, share):.3f}" for of in (whole_s, first_s) for share in (0.5, 0.99))
        print(f"| {name} | {len(some)} | {' | '.join(values)} |")
    took = [roll.done - roll.begun for roll in course.rolls]
    print(
        f"\nA rollover, from the begin of publishing to the last replica: median {percentile(took, 0.5):.1f} s, "
        f"largest {max(took):.1f} s"
    )
