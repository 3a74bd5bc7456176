"""The `headrace` command. Exit status: 0 success, 1 failure, 2 bad input, 130 after Ctrl-C, 143 after SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cluster.feedback_commands import commands as feedback_commands
from cluster.loopback import stay_on_loopback
from contracts import loading as configuration
from contracts.config import Config, ConfigError
from contracts.reward_model import RewardTrainConfig
from contracts.stopping import StopRequest

T = TypeVar("T")

app = typer.Typer(
    name="headrace",
    help="Reinforcement learning from human feedback on Ray: rollouts, rewards, PPO, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, for example examples/quickstart.yaml")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings to change, for example training.learning_rate=2e-6"),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="what `headrace submit` or `ray job submit` printed")]
ClusterOption = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="the cluster's dashboard, for example http://127.0.0.1:8265",
    ),
]


@app.command()
def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train a policy: preferences and reward model (if configured), PPO, evaluation, report.

    Ctrl-C or SIGTERM finishes the running step, writes a checkpoint and ends; a second Ctrl-C ends at once.
    Continue with `headrace train CONFIG resume=true`. With `serving.start` the policy is served meanwhile, and on.
    """
    _train(configuration.load(config, overrides or ()), config)


@app.command("loop")
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


@app.command()
def serve(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file; none with --stop")] = None,
    overrides: OverridesArgument = None,
    stop: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="take the policy of this serving.name off a cluster, its answers finished"),
    ] = None,
    address: Annotated[str, typer.Option(help="the cluster of --stop, as in ray.address")] = "auto",
) -> None:
    """Serve a policy through an OpenAI-compatible API: serving.model, or the newest checkpoint, or model.path.

    Ctrl-C or SIGTERM finishes the answers that are being written and ends; a second Ctrl-C ends at once. What was left
    on a cluster by a run with `serving.start` ends with `headrace serve --stop NAME`.
    """
    if (config is None) == (stop is None):
        raise ConfigError("headrace serve takes either CONFIG, to serve, or --stop NAME, to end what a cluster serves")
    if stop is not None:
        _stop_serving(stop, address)
        return
    assert config is not None
    settings = configuration.load(config, overrides or ())
    if settings.ray.address is None:
        stay_on_loopback()
    from cluster.serve_command import check_serving, serve_policy  # imports are slow, and `--help` should not be

    job = check_serving(settings)
    from cluster.progress import Progress

    with Progress(0) as progress:
        _, received = run_until_signal(lambda stopping: serve_policy(job, progress, stopping))
    if received is not None:
        raise SystemExit(128 + received)


def _stop_serving(name: str, address: str) -> None:
    from cluster.progress import Progress  # imports are slow, and `--help` should not be
    from cluster.stop_serving import stop_serving

    with Progress(0) as progress:
        removed, received = run_until_signal(lambda stopping: stop_serving(name, address, progress))
    if removed is None:
        raise SystemExit(128 + (received or 0))
    print(removed)


@app.command("reward-train")
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


@app.command("reward-rollout")
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


@app.command()
def label(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Let people label: a page and an API where annotators compare responses. Votes go to `labelling.store`.

    CONFIG needs a section `labelling` and no other; that of a run will do too. Annotators sign in with a token of
    `headrace annotator`. `headrace preferences` makes a preference file of the votes. Ctrl-C or SIGTERM ends.
    """
    settings = configuration.load_labelling(config, overrides or ())
    if settings.ray.address is None:
        stay_on_loopback()
    from cluster.label_command import check_labelling, label  # imports are slow, and `--help` should not be

    job = check_labelling(settings)
    from cluster.progress import Progress

    with Progress(0) as progress:
        _, received = run_until_signal(lambda stopping: label(job, progress, stopping))
    if received is not None:
        raise SystemExit(128 + received)


@app.command()
def doctor(
    folder: Annotated[
        Path,
        typer.Argument(metavar="[RUN_DIR]", help="a run, or the folder of runs, to look over for half-written files"),
    ] = Path("runs"),
    address: Annotated[str | None, typer.Option(help="a Ray cluster, to ask what dead runs left on it")] = None,
) -> None:
    """Check this machine: Python, Ray, vLLM's build, cores, memory, GPU, leftovers, and what would go wrong.

    Leftovers of runs that were killed, or of a machine that crashed, are named with what to do about them.
    """
    from cluster.doctor import diagnose, exit_status, print_findings

    findings = diagnose(folder, address or os.environ.get("RAY_ADDRESS"))
    print_findings(findings)
    raise SystemExit(exit_status(findings))


@app.command("eval")
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


@app.command("reward-eval")
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


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder (runs/NAME/checkpoints/step-NNNNNN) of a run")],
    to: Annotated[Path, typer.Option(help="folder to write; must not exist")],
) -> None:
    """Copy a checkpoint's policy, verified, to a Hugging Face folder that transformers and vLLM load."""
    from cluster.export import export_policy

    print(f"wrote {export_policy(checkpoint, to)}")


@app.command()
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


@app.command()
def submit(
    config: ConfigArgument,
    address: ClusterOption,
    overrides: OverridesArgument = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="also not sent, as in .gitignore; may be given again")
    ] = None,
    grace_s: Annotated[
        int, typer.Option(min=1, help="how long a stop may take to write its checkpoint before Ray kills the run")
    ] = 600,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the run until it ends")] = True,
) -> None:
    """Train on a cluster: send the working directory and start `headrace train CONFIG` there as a Ray job.

    Prints the job's id, then its log. Ctrl-C leaves the job running. The exit status is that of the run, 143 if it was
    stopped. Continue with the same command and `resume=true`.
    """
    from cluster import submit as jobs

    raise SystemExit(
        followed(jobs.submit(config, overrides or (), address, excludes=exclude or (), grace_s=grace_s, wait=wait))
    )


@app.command()
def status(job: JobArgument, address: ClusterOption) -> None:
    """How a job on a cluster stands: state, output_dir, newest step."""
    from cluster import submit as jobs

    followed(jobs.show_status(job, address))


@app.command()
def logs(
    job: JobArgument,
    address: ClusterOption,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="until the job ends; Ctrl-C leaves it running")
    ] = False,
) -> None:
    """The log of a job on a cluster."""
    from cluster import submit as jobs

    raise SystemExit(followed(jobs.show_log(job, address, follow=follow)))


@app.command()
def stop(job: JobArgument, address: ClusterOption) -> None:
    """Stop a job on a cluster: it finishes its step and writes a checkpoint. Waits until it has."""
    from cluster import submit as jobs

    raise SystemExit(followed(jobs.stop(job, address)))


@app.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="whose it is; stands in logs and beside feedback")],
    scopes: Annotated[str, typer.Option(help="what it may do: chat, score, feedback, admin")] = "chat,score,feedback",
    file: Annotated[
        Path | None, typer.Option(help="the file that `serving.keys` names; made where it is not there")
    ] = None,
) -> None:
    """Make an API key for `headrace serve`. It is printed once; only its hash is kept.

    Without --file the line to keep goes to stderr: into a file, or into HEADRACE_API_KEYS.
    """
    from serving.keys import make_key

    secret, kept = make_key(name, scopes, file)
    print(f"keep this line: {kept.line}" if file is None else f"added {name!r} to {file}", file=sys.stderr)
    print(secret)


app.add_typer(feedback_commands)

UrlOption = Annotated[str, typer.Option(help="of `headrace serve`, for example http://127.0.0.1:8000")]
KeyOption = Annotated[
    str | None, typer.Option(envvar="HEADRACE_API_KEY", help="an API key with the scope admin, where keys are set")
]


@app.command()
def pin(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="a number, or latest to follow training again")],
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
) -> None:
    """Let a serving application stay at a version, or follow training again."""
    from cluster import versions_command

    print(versions_command.pin(url, version, key))


@app.command()
def rollback(
    version: Annotated[int, typer.Argument(min=0, metavar="VERSION", help="older than the one that is served")],
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
) -> None:
    """Let a serving application go back to an older version and stay there, until `headrace pin latest`."""
    from cluster import versions_command

    print(versions_command.rollback(url, version, key))


def followed(work: Coroutine[Any, Any, T]) -> T:
    """Watch what happens elsewhere: Ctrl-C ends the watching alone."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:  # no answer in time, or a connection that broke: nothing that a traceback would explain
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def run_until_signal(
    start: Callable[[StopRequest], Coroutine[Any, Any, Any]],
) -> tuple[Any, int | None]:
    """Run a coroutine until it ends or SIGINT or SIGTERM comes.

    The first signal lets it end by itself where it has said that it can (`StopRequest.graceful`), and cancels it
    where not; a second one cancels it in any case. Returns its result (None if cancelled) and the first signal.
    """
    received: list[int] = []

    async def main() -> Any:
        stopping = StopRequest()
        task = asyncio.ensure_future(start(stopping))
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            ends_by_itself = stopping.graceful and not received
            consequence = stopping.consequence if ends_by_itself else "is cancelled"
            stopping.on_signal(signal.Signals(number).name, consequence)
            if not ends_by_itself:
                task.cancel()
            else:
                print("\nstopping: what runs is brought to an end first; again to stop at once", file=sys.stderr)
            received.append(number)
            stopping.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        return await task

    try:
        result = asyncio.run(main())
    except asyncio.CancelledError:
        if not received:
            raise
        result = None
    return result, received[0] if received else None


def how_to_continue(output_dir: Path, config: Path, outcome: Any, *, command: str = "train") -> str:
    """What to do after a run was stopped."""
    if outcome is None and not (output_dir / "config.yaml").exists():
        return "stopped before anything was written; start again"
    if outcome is not None and outcome.finished:
        return f"training finished after step {outcome.step}; the policy is not served any more"
    where = f"after step {outcome.step}" if outcome is not None else "at once"
    return f"stopped {where}; continue with: headrace {command} {config} resume=true"


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
