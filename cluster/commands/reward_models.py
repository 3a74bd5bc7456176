"""`headrace reward-train`, `reward-rollout` and `reward-eval`: a reward model by itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.arguments import ConfigArgument, OverridesArgument
from cluster.commands.until_signal import how_to_continue, run_until_signal
from contracts import loading as configuration
from contracts.reward_model import RewardTrainConfig


def reward_train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train a reward model on files of pairs and labels: output_dir/reward_model, with its card.

    Ctrl-C or SIGTERM finishes the running step, writes a checkpoint and ends; a second Ctrl-C ends at once.
    Continue with `headrace reward-train CONFIG resume=true`: it ends bit for bit as if it had not been interrupted.
    """
    settings = configuration.load(config, overrides or (), kind=RewardTrainConfig)
    from cluster.reward_train import (
        check_reward_train,
        train_from_files,
    )  # imports are slow, and `--help` should not be

    training = check_reward_train(settings)
    from cluster.progress import Progress

    with Progress(0) as progress:
        report, received = run_until_signal(lambda stopping: train_from_files(training, progress, stopping))
    if received is not None and report is None:  # else the signal came when all was done
        print(how_to_continue(settings.output_dir, config, None, command="reward-train"), file=sys.stderr)
        raise SystemExit(128 + received)


def reward_rollout(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a run that is training")],
    model: Annotated[Path, typer.Argument(metavar="REWARD_MODEL", help="folder that `headrace reward-train` wrote")],
    component: Annotated[str | None, typer.Option(help="which of its rewards; default: the only reward model")] = None,
    wait_s: Annotated[float, typer.Option(min=1, help="how long to wait for the run to take it")] = 300.0,
) -> None:
    """Let a running training score with another reward model from now on, without stopping it."""
    from cluster.reward_rollout import ask

    try:
        print(ask(run, component, model, wait_s=wait_s))
    except TimeoutError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def evaluate_reward(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="reward model: folder, Hugging Face id or bundled:NAME")
    ],
    pairs: Annotated[Path, typer.Option(help="labelled pairs that it was not trained on: prompt, chosen, rejected")],
    new: Annotated[Path | None, typer.Option(help="labels that came later, not trained on yet")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write; default: runs/reward-eval-VERSION")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="at most so many pairs of a file, drawn by prompt")] = None,
    head: Annotated[str | None, typer.Option(help="which head, of a reward model with several")] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="longer dialogues lose their beginning")] = 1024,
    leave_one_domain_out: Annotated[
        bool, typer.Option("--leave-one-domain-out", help="also train heads on a frozen base without each domain")
    ] = False,
    base: Annotated[str | None, typer.Option(help="that frozen base; default: what the model's card names")] = None,
) -> None:
    """Judge a reward model on labelled pairs: accuracy, calibration, baselines, length, invariance; one HTML page."""
    from cluster.progress import Progress
    from cluster.reward_eval import RewardEvalOptions, evaluate_reward_model

    options = RewardEvalOptions(
        model, pairs, new, out, limit, max_tokens, head, leave_one_domain_out=leave_one_domain_out, base=base
    )
    with Progress(0) as progress:
        try:
            evaluate_reward_model(options, progress)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
