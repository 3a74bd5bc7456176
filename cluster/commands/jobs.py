"""`headrace submit`, `status`, `logs` and `stop`: a run on a cluster, from outside."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import typer

from cluster.commands.arguments import ConfigArgument, OverridesArgument

T = TypeVar("T")

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="what `headrace submit` or `ray job submit` printed")]
ClusterOption = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="the cluster's dashboard, for example http://127.0.0.1:8265",
    ),
]


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


def status(job: JobArgument, address: ClusterOption) -> None:
    """How a job on a cluster stands: state, output_dir, newest step."""
    from cluster import submit as jobs

    followed(jobs.show_status(job, address))


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


def stop(job: JobArgument, address: ClusterOption) -> None:
    """Stop a job on a cluster: it finishes its step and writes a checkpoint. Waits until it has."""
    from cluster import submit as jobs

    raise SystemExit(followed(jobs.stop(job, address)))


def followed(work: Coroutine[Any, Any, T]) -> T:
    """Watch what happens elsewhere: Ctrl-C ends the watching alone."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:  # no answer in time, or a connection that broke: nothing that a traceback would explain
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
