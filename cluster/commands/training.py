"""`headrace train`, `loop`, `eval`, `export` and `replay`: a policy, from prompts to its weights again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.arguments import ConfigArgument, OverridesArgument
from cluster.commands.until_signal import how_to_continue, run_until_signal
from cluster.loopback import stay_on_loopback
from contracts import loading as configuration
from contracts.config import Config, ConfigError


def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train a policy: preferences and reward model (if configured), PPO, evaluation, report.

    Ctrl-C or SIGTERM finishes the running step, writes a checkpoint and ends; a second Ctrl-C ends at once.
    Continue with `headrace train CONFIG resume=true`. With `serving.start` the policy is served meanwhile, and on.
    """
    _train(configuration.load(config, overrides or ()), config)


def closed_loop(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train in rounds: ask about the policy, learn a reward from all votes so far, PPO on it, evaluate, and again.

    CONFIG is that of `headrace train` with a section `loop: {rounds: 3}` and votes of people (preferences.people) or of
    a simulated panel. Stops and goes on like `headrace train`.
    """
    settings = configuration.load(config, overrides or ())
    if settings.loop is None:
        raise ConfigError(f"{config}: has no section `loop`; add for example `loop: {{rounds: 3}}`")
    _train(settings, config)


def _train(settings: Config, config: Path) -> None:
    from cluster.preflight import check  # imports are slow, and `--help` should not be

    preflight = check(settings)
    if settings.ray.address is None:
        stay_on_loopback()
    from cluster.outliving import check_served
    from cluster.progress import Progress
    from cluster.train import run

    served = check_served(settings)
    with Progress(settings.steps) as progress:
        outcome, received = run_until_signal(lambda stopping: run(settings, preflight, progress, stopping, served))
    if received is not None:
        print(how_to_continue(settings.output_dir, config, outcome), file=sys.stderr)
        raise SystemExit(128 + received)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder (runs/NAME/checkpoints/step-NNNNNN) of a run")],
    prompts: Annotated[Path, typer.Option(help="prompt file, JSONL or Parquet")],
    output: Annotated[Path | None, typer.Option(help="also write the result as JSON to this file")] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Sample and score a checkpoint's policy on prompts, with the run's own rewards and judges."""
    from cluster.checkpoints import evaluation_settings

    settings = evaluation_settings(checkpoint, prompts, overrides or ())
    if settings[0].ray.address is None:
        stay_on_loopback()
    from cluster.eval_command import evaluate_checkpoint
    from cluster.progress import Progress

    with Progress(0) as progress:
        _, stopped = run_until_signal(lambda stopping: evaluate_checkpoint(settings, output, progress))
    if stopped is not None:
        raise SystemExit(128 + stopped)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder (runs/NAME/checkpoints/step-NNNNNN) of a run")],
    to: Annotated[Path, typer.Option(help="folder to write; must not exist")],
) -> None:
    """Copy a checkpoint's policy, verified, to a Hugging Face folder that transformers and vLLM load."""
    from cluster.export import export_policy

    print(f"wrote {export_policy(checkpoint, to)}")


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a run, for example runs/quickstart")],
    step: Annotated[int, typer.Option(min=1, help="whose weights to compute again")],
    to: Annotated[Path | None, typer.Option(help="folder to write; default: RUN_DIR/replay/step-NNNNNN")] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Compute the weights of a step again, bit for bit, from a checkpoint and the logged batches after it.

    Refused where versions, processor, threads, ranks or settings are not those of the run.
    """
    config = configuration.load(run / "config.yaml", overrides or ())
    if config.ray.address is None:
        stay_on_loopback()
    from cluster.progress import Progress
    from cluster.replay import replay_run, replay_settings

    settings, problems = replay_settings(config, run, step, to)
    with Progress(0) as progress:
        told, stopped = run_until_signal(lambda stopping: replay_run(settings, problems, progress))
    if stopped is not None:
        raise SystemExit(128 + stopped)
    print("\n".join(told))
