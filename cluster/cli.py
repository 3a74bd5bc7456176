"""The `headrace` command. Exit status: 0 success, 1 failure, 2 bad input, 130 after Ctrl-C, 143 after SIGTERM."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import typer

from cluster.commands import jobs, labelling, machine, reward_models, serving, training
from contracts.config import ConfigError

# In the order of `headrace --help`.
COMMANDS: dict[str, Callable[..., None]] = {
    "train": training.train,
    "loop": training.closed_loop,
    "serve": serving.serve,
    "reward-train": reward_models.reward_train,
    "reward-rollout": reward_models.reward_rollout,
    "label": labelling.label,
    "doctor": machine.doctor,
    "eval": training.evaluate,
    "reward-eval": reward_models.evaluate_reward,
    "export": training.export,
    "replay": training.replay,
    "submit": jobs.submit,
    "status": jobs.status,
    "logs": jobs.logs,
    "stop": jobs.stop,
    "key": serving.key,
    "pin": serving.pin,
    "rollback": serving.rollback,
    "annotator": labelling.annotator,
    "preferences": labelling.preferences,
}

app = typer.Typer(
    name="headrace",
    help="Reinforcement learning from human feedback on Ray: rollouts, rewards, PPO, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)


def first_cause(error: BaseException) -> BaseException:
    """The first error that is not a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main() -> None:
    """Entry point: one clear line for bad input, a traceback only for what is not the user's."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # reward functions live in the user's working directory
    try:
        app(prog_name="headrace")
    except Exception as error:  # noqa: BLE001 - the last place where an error can become an exit status
        cause = first_cause(error)
        if isinstance(cause, ConfigError):
            print(f"error: {cause}", file=sys.stderr)
            raise SystemExit(2) from None
        traceback.print_exception(cause)
        print(f"error: {type(cause).__name__}: {cause}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
