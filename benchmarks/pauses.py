"""How long an engine holds its requests for new weights, and where that time goes.

    python -m benchmarks.pauses [--model bundled:smollm2-135m-instruct] [--requests 8] [--updates 20] [--changed 1.0]

One vLLM engine with running requests takes deltas; every response goes on under the new weights. Prints Markdown: the
seconds before the pause (the delta is checked and written to the shadow while generation goes on), until the engine
stands still, while its workers load the shadow, and until it has resumed.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.weights import described, move
from cluster.doctor.software import versions
from models import bundled
from models.engine import Engine
from models.engine_update import UpdateTimes
from models.weight_stream import DeltaReceiver, DeltaSender

PARTS = ("write_s", "pause_s", "load_s", "resume_s", "held_s")
CONTEXT, NEW_TOKENS = 512, 400
DEADLINE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--requests", type=int, default=8, help="running while the weights change")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--changed", type=float, default=1.0, metavar="PERCENT", help="of the values in an update")
    parser.add_argument("--keep-cache", action="store_true", help="cached states of the old weights are kept")
    arguments = parser.parse_args()
    times = asyncio.run(measured(arguments))
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"\n`{' '.join(['python -m benchmarks.pauses', *sys.argv[1:]])}`, {os.cpu_count()} cores\n")
    print(f"| of {len(times)} updates | written before the pause, s | pause, s | load, s | resume, s | held, s |")
    print("| --- |" + " ---: |" * len(PARTS))
    for name, of in (("median", statistics.median), ("largest", max)):
        cells = " | ".join(f"{of([getattr(each, part) for each in times]):.3f}" for part in PARTS)
        print(f"| {name} | {cells} |")


async def measured(arguments: argparse.Namespace) -> list[UpdateTimes]:
    """The times of each update after the first, which pays for memory once."""
    folder = bundled.resolve(arguments.model)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(Path(folder, "model.safetensors")).items()}
    engine = await Engine.start(folder, max_model_len=CONTEXT, max_num_seqs=arguments.requests)
    requests = asyncio.create_task(keep_generating(engine, arguments.requests))
    try:
        sender, receiver = DeltaSender(), DeltaReceiver(engine.shadow_tensors, 0)
        sender.seed(tensors.items(), 0)
        times = []
        for version in range(1, arguments.updates + 2):
            move(tensors, arguments.changed / 100, "steps", seed=version)
            frames = await asyncio.to_thread(list, sender.encode(tensors.items(), version))
            update = described(sender, frames, version - 1, version)
            while engine.num_running() < arguments.requests:  # noqa: ASYNC110 the engine's to say
                await asyncio.sleep(0.01)
            write = functools.partial(receiver.apply, frames, update=update, sender="the benchmark")
            keep = arguments.keep_cache
            times.append(await engine.update(version, written(write), deadline_s=DEADLINE_S, clear_cache=not keep))
        return times[1:]
    finally:
        requests.cancel()
        await asyncio.wait([requests], timeout=DEADLINE_S)
        engine.shutdown()


def written(write: Callable[[], object]) -> Callable[[Mapping[str, Tensor]], object]:
    """`write` as the engine calls it; the receiver has held the tensors from the beginning."""
    return lambda _: write()


async def keep_generating(engine: Engine, count: int) -> None:
    """As many responses as `count` at any time."""

    async def one(number: int) -> None:
        prompt, turn = [1 + number, *range(100, 130)], 0
        while True:
            await engine.generate(
                prompt, request_id=f"{number}-{turn}", max_tokens=NEW_TOKENS, temperature=1.0, seed=number
            )
            turn += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(one(number))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
