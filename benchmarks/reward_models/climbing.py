"""Runs that climb a weak reward on purpose: what they train, and what their files say afterwards.

For each seed: one short run asks the simulated voters about pairs of the untrained policy's responses. Some of the
pairs train the weak reward models (an ensemble, and with the rule `single` one by itself), others a held-out one. Then
one run trains for each rule, and one on gold itself, in which there is nothing to over-optimise.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.reward_models.gold_turn import Climb
from cluster import experience_log
from cluster.preferences import trained_reward_model
from cluster.preflight.run_folder import flat
from cluster.run_log import metrics_rows
from cluster.watch import Watch
from contracts.config import Config
from contracts.loading import load
from contracts.records import ScoredRollout
from contracts.reward_model import RewardTrainConfig
from contracts.section import Section
from contracts.watch import WatchConfig
from feedback.formats import read_preferences, write_preferences

ROOT = Path(__file__).parents[2]
GOLD_JUDGE = "examples.judges:vader"
PROXY, GOLD, HELD_OUT = "proxy", "gold", "held_out"
CONTROL = "gold itself"
ENSEMBLES = ("mean", "minimum", "mean_minus_std")
RULES = ("single", *ENSEMBLES)
STOP_S = 900.0
RUN_S = 12 * 3600.0  # of one training
MAY_DIFFER = ("output_dir", "resume", "steps", "checkpoint.every_steps")  # the steps that are asked for are read


def climbs(arguments: argparse.Namespace, folder: Path) -> list[Climb]:
    """Every run of every seed, trained where `folder` does not have it yet."""
    found = []
    for seed in range(arguments.seeds):
        home = folder / f"seed-{seed}"
        models = reward_models(arguments, home, seed)
        for rule in (*arguments.rules, CONTROL):
            run_dir = home / rule.replace(" ", "_")
            train(run_config(arguments, run_dir, seed) | {"rewards": rewards(rule, models)}, run_dir)
            found.append(read_climb(run_dir, rule, seed, steps=arguments.steps))
    return found


def run_config(arguments: argparse.Namespace, run_dir: Path, seed: int) -> dict[str, Any]:
    """As the quickstart, but for what lets the policy run away."""
    config = quickstart()
    for section in ("preferences", "rewards", "evaluation"):
        del config[section]
    config |= {
        "output_dir": str(run_dir.resolve()),
        "steps": arguments.steps,
        "seed": seed,
        "model": {**config["model"], "path": arguments.base},
        "prompts": {**config["prompts"], "path": str(ROOT / config["prompts"]["path"]), "eval_count": 0},
        "algorithm": {"name": "ppo", "kl_coef": arguments.kl_coef},
        "training": {**config["training"], "learning_rate": arguments.learning_rate},
        "checkpoint": {"every_steps": arguments.steps, "keep": 1},
        "watch": {},
        "logging": {"tensorboard": False},
        "ray": {"dashboard": False},
    }
    return config


def quickstart() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    return config


def rewards(rule: str, models: dict[str, Path]) -> list[dict[str, Any]]:
    """What a rule trains on, with weight 1, and what is looked at, with weight 0."""
    proxy = {"name": PROXY, "model": str(models["single" if rule == "single" else "ensemble"])}
    if rule in ENSEMBLES:
        proxy["ensemble"] = rule
    gold = {"name": GOLD, "function": GOLD_JUDGE}
    held_out = {"name": HELD_OUT, "model": str(models["held_out"])}
    trained = GOLD if rule == CONTROL else PROXY
    return [{**each, "weight": float(each["name"] == trained)} for each in (proxy, gold, held_out)]


def reward_models(arguments: argparse.Namespace, home: Path, seed: int) -> dict[str, Path]:
    """`ensemble` and `single`, which learn from the same few pairs, and `held_out`, from others."""
    asked = home / "asked"
    settings = {
        "trainable_layers": arguments.trainable_layers,
        "learning_rate": 2e-4,
        "epochs": 2,
        "batch_size": 8,
        "calibration_fraction": 0,
    }
    panel = quickstart()["preferences"]["simulate"] | {"pairs": arguments.pairs + arguments.held_out_pairs}
    config = run_config(arguments, asked, seed) | {"steps": 1, "rewards": [{"name": GOLD, "function": GOLD_JUDGE}]}
    # A run with preferences trains a reward model of its own: here the least one, which nobody uses.
    config["preferences"] = {"simulate": panel, "reward_model": {**settings, "trainable_layers": 0, "epochs": 1}}
    train(config, asked)
    rows, _ = read_preferences(asked / "preferences.parquet")
    parts = {"weak": rows[: arguments.pairs], "held_out": rows[arguments.pairs :]}
    wanted = {"ensemble": ("weak", arguments.members), "held_out": ("held_out", 1)}
    if "single" in arguments.rules:
        wanted["single"] = ("weak", 1)
    for name, (part, members) in wanted.items():
        file = home / f"{part}-{len(parts[part])}.parquet"
        if not file.exists():
            write_preferences(parts[part], file)
        config = {
            "output_dir": str((home / name).resolve()),
            "seed": seed,
            "preferences": {
                "path": str(file.resolve()),
                "reward_model": {**settings, "base": arguments.base, "members": members, "max_tokens": 160},
            },
        }
        train_reward_model(config, home / name)
    return {name: trained_reward_model(home / name).resolve() for name in wanted}


def train_reward_model(config: dict[str, Any], folder: Path) -> None:
    """`headrace reward-train`, unless `folder` holds that one already; one that was interrupted goes on."""
    saved = folder / "config.yaml"
    if saved.exists():
        check_same(load(saved, kind=RewardTrainConfig), RewardTrainConfig.model_validate(config), folder)
    if not trained_reward_model(folder).exists():
        headrace("reward-train", config, folder.with_suffix(".yaml"), resume=saved.exists())


def train(config: dict[str, Any], run_dir: Path) -> None:
    """`headrace train`, unless `run_dir` holds that run already; one that was interrupted goes on.

    Checkpoints, gigabytes each, go when the run is done: the experience log has all that is read of it.
    """
    saved = run_dir / "config.yaml"
    if saved.exists():
        check_same(load(saved), Config.model_validate(config), run_dir)
    if len(metrics_rows(run_dir)) >= config["steps"]:
        return
    headrace("train", config, run_dir.with_suffix(".yaml"), resume=saved.exists())
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def check_same(saved: Section, wanted: Section, folder: Path) -> None:
    """Raises SystemExit unless what is there is what is wanted. Paths may differ, the folder may have been moved; of
    files that were made of other pairs the name differs."""
    before, after = (flat(each.model_dump(mode="json")) for each in (saved, wanted))
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if re.fullmatch(r"rewards\.\d+\.model|.*path", name):
            was, now = (value and Path(value).name for value in (was, now))
        if was != now and name not in MAY_DIFFER:
            raise SystemExit(f"{folder}: was made with other settings ({name}: {was} -> {now}); give another folder")


def headrace(command: str, config: dict[str, Any], path: Path, *, resume: bool) -> None:
    """Run a command to its end, its output to stderr.

    Raises:
        SystemExit: it failed. What it has done stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    call = [sys.executable, "-m", "cluster.cli", command, str(path), *(["resume=true"] if resume else [])]
    # stdout holds the tables alone. The path is where the judges are imported from.
    process = subprocess.Popen(call, stdout=sys.stderr, cwd=ROOT)
    try:
        status = process.wait(RUN_S)
    except (KeyboardInterrupt, SystemExit, subprocess.TimeoutExpired) as error:
        process.terminate()  # it writes a checkpoint, and its Ray ends with it
        process.wait(STOP_S)
        if isinstance(error, subprocess.TimeoutExpired):
            raise SystemExit(f"{path}: headrace {command} had not ended after {RUN_S / 3600:g} hours") from error
        raise
    if status:
        raise SystemExit(f"{path}: headrace {command} ended with status {status}; see above")


def read_climb(run_dir: Path, rule: str, seed: int, *, steps: int) -> Climb:
    """The first `steps` steps of a run, from its experience log.

    Raises:
        ValueError: a batch is missing or damaged.
    """
    batches = [experience_log.batch(run_dir, step) for step in range(1, steps + 1)]

    def component(name: str) -> list[Any]:
        return [np.array([sample.reward_components[name] for sample in batch]) for batch in batches]

    return Climb(
        rule=rule,
        seed=seed,
        kl_SB=[np.array([response_kl(sample) for sample in batch]) for batch in batches],
        proxy_SB=component(PROXY),
        gold_SB=component(GOLD),
        held_out_SB=component(HELD_OUT),
        alarms=first_raised(load(run_dir / "config.yaml"), batches),
    )


def response_kl(sample: ScoredRollout) -> float:
    """k1 estimate of KL(policy || reference) from one response (Schulman 2020)."""
    return sum(sample.rollout.behavior_logprobs) - sum(sample.reference_logprobs)


def first_raised(config: Config, batches: Sequence[Sequence[ScoredRollout]]) -> dict[str, int]:
    """The step in which each alarm is first raised by a watch that is not shown gold, unless that is trained on: who
    has gold needs no watch."""
    weights = {component.name: component.weight for component in config.rewards}
    hidden = {GOLD} if weights.get(GOLD) == 0 else set()
    learned = [component.name for component in config.rewards if component.model is not None]
    watch = Watch(config.watch or WatchConfig(), {k: v for k, v in weights.items() if k not in hidden}, learned)
    found: dict[str, int] = {}
    for step, batch in enumerate(batches, 1):
        shown = [
            replace(sample, reward_components={k: v for k, v in sample.reward_components.items() if k not in hidden})
            for sample in batch
        ]
        for alarm in watch.step(step, shown).raised:
            found.setdefault(alarm.name, step)
    return found
