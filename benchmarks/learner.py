"""The learner alone: share of the matrix-product peak that its steps reach, and peak memory.

    python -m benchmarks.learner utilization [--model ...] [--threads 2]
    python -m benchmarks.learner memory
    python -m benchmarks.learner layouts

Random tokens of the stated lengths through the real learner (one rank, bf16): a step is a scoring pass and two epochs
of PPO with a value head. Model FLOPs are 2 N a scored token and 6 N a trained one, N parameters with the embedding; a
shared prompt counts once, because it is computed once. The peak is the best of several bf16 products of 2048 x 2048
matrices, taken before and after each measurement in the same process. Run it with the allocator settings that a run
gives its learner: they are applied by starting this program again. `layouts` compares log-probabilities of the same
tokens packed in other ways.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

STARTED_AGAIN = "HEADRACE_BENCHMARK_STARTED"


@dataclass(frozen=True)
class Shape:
    """Groups of responses to one prompt, all of one length, and the budget that cuts them."""

    groups: int
    samples_per_prompt: int
    prompt_tokens: int
    response_tokens: int
    budget: int
    packing: str = "shared_prompts"

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the trunk in one pass."""
        samples = self.groups * self.samples_per_prompt
        prompts = self.groups if self.packing == "shared_prompts" else samples
        return prompts * self.prompt_tokens + samples * self.response_tokens

    def __str__(self) -> str:
        return (
            f"{self.groups}x{self.samples_per_prompt} responses, {self.prompt_tokens}+{self.response_tokens} tokens, "
            f"budget {self.budget}, {self.packing}"
        )


UTILIZATION = (
    Shape(24, 4, 29, 35, 4096),
    Shape(8, 4, 29, 35, 4096),
    Shape(8, 4, 29, 35, 4096, "padded"),
    Shape(8, 2, 64, 192, 4096),
)
MEMORY = (
    *(Shape(8, 4, 64, 192, budget) for budget in (1024, 2048, 4096, 8192)),
    *(Shape(8 * 192 // length, 4, 64, length, 4096) for length in (96, 384, 768)),
)


def main() -> None:
    from learner.rank import training_environment

    if os.environ.get(STARTED_AGAIN) is None:  # read by the C library before Python starts
        environment = os.environ | training_environment() | {STARTED_AGAIN: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.learner", *sys.argv[1:]], environment)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["utilization", "memory", "layouts"])
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=4, help="measured steps after one for warming up")
    arguments = parser.parse_args()
    print(f"`python -m benchmarks.learner {' '.join(sys.argv[1:])}`, {arguments.threads} threads\n")
    if arguments.what == "utilization":
        print("| batch | step, s | GFLOP/s | peak, GFLOP/s | share | trained tokens/s |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for shape in UTILIZATION:
            print(_in_process(_utilization, shape, arguments), flush=True)
    elif arguments.what == "layouts":
        print("| against sequences end to end | type | mean difference | largest |\n| --- | --- | ---: | ---: |")
        print(_in_process(_layouts, Shape(8, 4, 29, 35, 4096), arguments), flush=True)
    else:
        print("| batch | peak memory, GiB | above the loaded learner |\n| --- | ---: | ---: |")
        for shape in MEMORY:
            print(_in_process(_memory, shape, arguments), flush=True)


def _in_process(measure, shape, arguments):
    """A fresh process each: what one measurement leaves in memory is not the next one's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (shape, arguments))


def _utilization(shape: Shape, arguments: argparse.Namespace) -> str:
    learner = _learner(shape, arguments)
    batch = _batch(shape)
    seconds, peaks = [], [_peak()]
    for step in range(arguments.steps + 1):
        began = time.perf_counter()
        learner.step(batch, training_version=step)
        seconds.append(time.perf_counter() - began)
        peaks.append(_peak())
    parameters = sum(p.numel() for p in learner.policy.policy.parameters())
    flops = shape.computed_tokens * parameters * (2 + 6 * learner.training.epochs)
    step_s, peak = statistics.median(seconds[1:]), statistics.median(peaks[1:])
    trained = shape.computed_tokens * learner.training.epochs
    return (
        f"| {shape} | {step_s:.2f} | {flops / step_s / 1e9:.0f} | {peak / 1e9:.0f} | "
        f"{flops / step_s / peak:.0%} | {trained / step_s:.0f} |"
    )


def _memory(shape: Shape, arguments: argparse.Namespace) -> str:
    learner = _learner(shape, arguments)
    batch = _batch(shape)
    learner.step(batch[:4], training_version=0)  # moments of the optimizer and gradients exist from here on
    loaded = _resident_gib()
    for step in range(2):
        learner.step(batch, training_version=step)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return f"| {shape} | {highest:.2f} | {highest - loaded:.2f} |"


def _layouts(shape: Shape, arguments: argparse.Namespace) -> str:
    """Log-probabilities of the same tokens through other layouts and other cuts, in nats."""
    from learner.experience import to_experience

    lines = []
    for dtype in ("float32", "bfloat16"):
        found = {}
        for name, packing, budget in (
            ("sequences", "sequences", 4096),
            ("shared prompts", "shared_prompts", 4096),
            ("padded", "padded", 4096),
            ("micro-batches of 256 tokens", "sequences", 256),
        ):
            learner = _learner(replace(shape, packing=packing, budget=budget), arguments, dtype=dtype)
            experience = to_experience(_batch(shape), token_budget=budget)
            predicted = learner._predict(experience, [list(range(len(experience)))])
            found[name] = predicted.logprobs_BT[experience.mask_BT]
        for name, logprobs in list(found.items())[1:]:
            gap = (logprobs - found["sequences"]).abs()
            lines.append(f"| {name} | {dtype} | {gap.mean():.1e} | {gap.max():.1e} |")
    return "\n".join(lines)


def _learner(shape: Shape, arguments: argparse.Namespace, *, dtype: str = "bfloat16"):
    import torch

    from contracts.algorithm import AlgorithmConfig, TrainingConfig
    from learner.ppo import PPOLearner
    from models.bundled import resolve

    torch.set_num_threads(arguments.threads)
    settings: dict[str, Any] = {
        "batch_size": shape.groups * shape.samples_per_prompt,
        "samples_per_prompt": shape.samples_per_prompt,
        "epochs": 2,
        "minibatches": 1,
        "micro_batch_tokens": shape.budget,
        "packing": shape.packing,
        "dtype": dtype,
    }
    return PPOLearner(
        resolve(arguments.model),
        AlgorithmConfig(),
        TrainingConfig.model_validate(settings),
        temperature=1.0,
        max_response_tokens=shape.response_tokens,
        total_steps=100,
        seed=0,
    )


def _batch(shape: Shape):
    from contracts.records import Rollout, ScoredRollout

    source = random.Random(0)
    samples = []
    for group in range(shape.groups):
        prompt = [source.randrange(1000, 40000) for _ in range(shape.prompt_tokens)]
        for number in range(shape.samples_per_prompt):
            response = [source.randrange(1000, 40000) for _ in range(shape.response_tokens)]
            numbers = [-10.0] * shape.response_tokens
            rollout = Rollout(
                f"g{group}/{number}", f"p{group}", f"g{group}", prompt, response, "", numbers,
                [0] * shape.response_tokens, "length", "benchmark",
            )  # fmt: skip
            samples.append(ScoredRollout(rollout, source.gauss(0, 1), {}, "none", numbers))
    return samples


def _peak() -> float:
    """FLOP/s of a bf16 matrix product."""
    import torch

    size, repeats = 2048, 4
    a, b = torch.randn(2, size, size).to(torch.bfloat16)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - began))
    return best


def _resident_gib() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**30


if __name__ == "__main__":
    main()
