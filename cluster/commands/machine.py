"""`headrace doctor`: what would go wrong on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


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
