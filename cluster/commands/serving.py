"""`headrace serve`, `key`, `pin` and `rollback`: a policy that is served, and by whom it is used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.arguments import OverridesArgument
from cluster.commands.until_signal import run_until_signal
from cluster.loopback import stay_on_loopback
from contracts import loading as configuration
from contracts.config import ConfigError

UrlOption = Annotated[str, typer.Option(help="of `headrace serve`, for example http://127.0.0.1:8000")]
KeyOption = Annotated[
    str | None, typer.Option(envvar="HEADRACE_API_KEY", help="an API key with the scope admin, where keys are set")
]


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
        _stop(stop, address)
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


def _stop(name: str, address: str) -> None:
    from cluster.progress import Progress  # imports are slow, and `--help` should not be
    from cluster.stop_serving import stop_serving

    with Progress(0) as progress:
        removed, received = run_until_signal(lambda stopping: stop_serving(name, address, progress))
    if removed is None:
        raise SystemExit(128 + (received or 0))
    print(removed)


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


def pin(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="a number, or latest to follow training again")],
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
) -> None:
    """Let a serving application stay at a version, or follow training again."""
    from cluster import versions_command

    print(versions_command.pin(url, version, key))


def rollback(
    version: Annotated[int, typer.Argument(min=0, metavar="VERSION", help="older than the one that is served")],
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
) -> None:
    """Let a serving application go back to an older version and stay there, until `headrace pin latest`."""
    from cluster import versions_command

    print(versions_command.rollback(url, version, key))
