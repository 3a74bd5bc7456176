"""Samples per second of Headrace and of TRL's GRPO trainer: same model, prompts, lengths and machine, in one run.

    make install EXTRA=cpu && .venv/bin/python -m pip install "trl>=1.16"
    python -m benchmarks.against_trl [--steps 8]

Each trains the bundled model on 32 responses a step, 4 a prompt, at most 48 new tokens, temperature 1, learning rate
1e-6: TRL's GRPO (bf16 autocast, its best setting on CPU; transformers generates), Headrace's GRPO, and Headrace's PPO
with a critic and a reward model learned from 64 simulated comparisons on top. The reward of both GRPO runs is VADER
sentiment, and neither asks a reference model (TRL's default, beta 0); the PPO run does. Samples per second are the
median over steps, the first left out (memory and kernels are set up once there), of wall time from one step's end to
the next, generation, scoring, learning and weight updates included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.doctor.software import versions

PROMPTS = "examples/prompts/chitchat.jsonl"
BATCH, GROUP, NEW_TOKENS = 32, 4, 48
MODEL = "bundled:smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lags", type=int, nargs="+", default=[0], help="max_lag_steps of the Headrace runs")
    parser.add_argument("--trl-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl_only:
        print(json.dumps(train_with_trl(arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = {"TRL GRPO": in_another_process(arguments.steps)}
        for lag in arguments.lags:
            for name in ("GRPO", "PPO, critic, learned reward"):
                rows[f"Headrace {name}, max_lag_steps {lag}"] = train_with_headrace(
                    Path(folder, f"{name[:4]}{lag}"), arguments.steps, ppo=name.startswith("PPO"), lag=lag
                )
    print(report(rows))


def in_another_process(steps: int) -> list[float]:
    """TRL by itself, so that nothing of it is left in memory while Headrace runs."""
    command = [sys.executable, "-m", "benchmarks.against_trl", "--trl-only", "--steps", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds: list[float] = json.loads(output.splitlines()[-1])
    return seconds


def train_with_trl(steps: int) -> list[float]:
    """Seconds of each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from examples.judges import vader
    from models.bundled import resolve

    torch.set_num_threads(os.cpu_count() or 1)
    path = resolve(MODEL)
    lines = Path(PROMPTS).read_text(encoding="utf-8").splitlines()
    prompts = [{"prompt": [{"role": "user", "content": json.loads(line)["prompt"]}]} for line in lines]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    def reward(prompts: Any, completions: Any, **_: Any) -> Any:
        texts = [completion[0]["content"] for completion in completions]
        return list(vader(texts, texts))

    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(prompts),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                num_generations=GROUP,
                max_completion_length=NEW_TOKENS,
                max_steps=steps,
                learning_rate=1e-6,
                temperature=1.0,
                bf16=True,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        ).train()
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def train_with_headrace(folder: Path, steps: int, *, ppo: bool, lag: int) -> list[float]:
    """Seconds of each step, from the run's own metrics."""
    config = {
        "output_dir": str(folder),
        "steps": steps,
        "model": {"path": MODEL, "max_context_tokens": 256},
        "prompts": {"path": PROMPTS, "eval_count": 0},
        "sampling": {"max_response_tokens": NEW_TOKENS},
        "rollout": {"kv_cache_gib": 0.5, "max_concurrent": 64},
        "rewards": [{"name": "vader", "function": "examples.judges:vader"}],
        "algorithm": {"name": "grpo", "kl_coef": 0, "monitor_kl": False},
        "training": {
            "batch_size": BATCH,
            "samples_per_prompt": GROUP,
            "epochs": 1,
            "minibatches": 1,
            "learning_rate": 1e-6,
        },
        "streaming": {"max_lag_steps": lag},
        "checkpoint": {"every_steps": steps},
    }
    if ppo:
        config |= {
            "algorithm": {"name": "ppo"},
            "rewards": [{"name": "friendly", "model": "preferences"}],
            "preferences": {
                "simulate": {"gold": "examples.judges:vader", "pairs": 64},
                "reward_model": {"trainable_layers": 12, "batch_size": 8, "max_tokens": 256},
            },
        }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "cluster.cli", "train", str(path)], check=True, stdout=sys.stderr)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step_s"] for line in lines]


def report(rows: dict[str, list[float]]) -> str:
    rates = {name: BATCH / statistics.median(seconds[1:]) for name, seconds in rows.items()}
    base = next(iter(rates.values()))
    lines = [
        ", ".join(f"{name} {value}" for name, value in versions().items()),
        "",
        f"`python -m benchmarks.against_trl {' '.join(sys.argv[1:])}`, {os.cpu_count()} cores",
        "",
        "| trainer | samples/s | of TRL | seconds of each step |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, seconds in rows.items():
        shown = " ".join(f"{value:.1f}" for value in seconds)
        lines.append(f"| {name} | {rates[name]:.2f} | {rates[name] / base:.1f} x | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
