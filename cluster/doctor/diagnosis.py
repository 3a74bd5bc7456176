"""`headrace doctor`: looks over this machine and environment and says what would hurt a run, and what to do."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.doctor import leftovers, software, stale
from cluster.doctor.finding import Finding
from cluster.doctor.machine import GIB, available_memory_gib, free_disk_gib, visible_gpus

# `make train` stays under 12 GiB of memory; a checkpoint of its 135M model takes 2 GiB.
ENOUGH_MEMORY_GIB, LITTLE_MEMORY_GIB = 12.0, 4.0
ENOUGH_DISK_GIB, LITTLE_DISK_GIB = 10.0, 1.0
ENOUGH_SHM_GIB = 1.0  # ray.object_store_gib's default
MIN_OPEN_FILES = 4096
_COLORS = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def diagnose(folder: Path = Path("runs"), address: str | None = None) -> list[Finding]:
    """Look at everything; takes about a second, changes nothing, imports neither torch, ray nor vllm.

    Args:
        folder: a run, or where runs lie.
        address: of a Ray cluster that is asked what dead runs left on it (some seconds more); None: none is.
    """
    gpus = visible_gpus()
    return [
        software.check_python(),
        software.check_ray(),
        software.check_vllm(gpus),
        software.check_torch(gpus),
        software.check_torchvision(),
        software.check_openmp(),
        software.check_bytecode(),
        check_cores(len(os.sched_getaffinity(0))),
        check_memory(available_memory_gib()),
        check_disk(free_disk_gib(Path.cwd())),
        check_shared_memory(shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        *check_environment(os.environ),
        leftovers.check_cluster_pointer(),
        leftovers.check_segments(),
        leftovers.check_shared_memory(),
        leftovers.check_half_written(folder),
        leftovers.check_ray_processes(),
        leftovers.check_orphans(),
        leftovers.check_session_folders(),
        *([stale.check_applications(address)] if address else []),
    ]


def exit_status(findings: Sequence[Finding]) -> int:
    """1 if anything is bad, else 0."""
    return int(any(finding.status == "bad" for finding in findings))


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """One row a finding, and the advice below those that need it."""
    table = Table(box=box.SIMPLE)
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        # Text, not markup: 'headrace[cpu]' would lose its brackets.
        detail = Text(finding.detail)
        if finding.advice:
            detail.append(f"\n→ {finding.advice}", style=_COLORS[finding.status])
        table.add_row(Text(finding.status, style=_COLORS[finding.status]), Text(finding.name), detail)
    (console or Console()).print(table)


def check_cores(cores: int) -> Finding:
    """Cores this process may use; an engine and a learner share them."""
    if cores < 2:
        return Finding("cores", "warn", str(cores), "give at least 2: generation and training run at the same time")
    return Finding("cores", "ok", str(cores))


def check_memory(available_gib: float) -> Finding:
    """Memory that is free now."""
    detail = f"{available_gib:.1f} GiB available"
    if available_gib < LITTLE_MEMORY_GIB:
        return Finding(
            "memory", "bad", detail, f"a run of the smallest model needs more than {LITTLE_MEMORY_GIB:g} GiB"
        )
    if available_gib < ENOUGH_MEMORY_GIB:
        return Finding("memory", "warn", detail, f"the quickstart may take {ENOUGH_MEMORY_GIB:g} GiB")
    return Finding("memory", "ok", detail)


def check_disk(free_gib: float) -> Finding:
    """Free disk in the working directory, where runs/ is made."""
    detail = f"{free_gib:.1f} GiB free in the working directory"
    if free_gib < LITTLE_DISK_GIB:
        return Finding("disk", "bad", detail, "free some space or set output_dir to another disk")
    if free_gib < ENOUGH_DISK_GIB:
        return Finding("disk", "warn", detail, "checkpoints take 14 bytes a parameter: mind checkpoint.keep")
    return Finding("disk", "ok", detail)


def check_shared_memory(size_gib: float) -> Finding:
    """Size of /dev/shm: Ray's object store goes to disk, slowly, where it does not fit."""
    detail = f"{size_gib:.1f} GiB"
    if size_gib < ENOUGH_SHM_GIB:
        return Finding("/dev/shm", "warn", detail, "in a container: docker run --shm-size=2g")
    return Finding("/dev/shm", "ok", detail)


def check_open_files(limit: int) -> Finding:
    """Open files one process may have; Ray needs several for each worker."""
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    if limit < MIN_OPEN_FILES:
        return Finding("open files", "warn", str(limit), f"ulimit -n {MIN_OPEN_FILES}")
    return Finding("open files", "ok", str(limit))


def check_environment(environment: Mapping[str, str]) -> list[Finding]:
    """Variables that are known to hurt; one finding each, or a single ok."""
    findings = []
    if address := environment.get("RAY_ADDRESS"):
        advice = "unset it, unless runs should join that cluster (then say so with ray.address)"
        findings.append(Finding("RAY_ADDRESS", "warn", address, advice))
    if threads := environment.get("OMP_NUM_THREADS"):
        advice = "unset it; threads in the configuration decides for each worker"
        findings.append(Finding("OMP_NUM_THREADS", "warn", threads, advice))
    proxies = [name for name in environment if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")]
    exempt = ",".join(environment.get(name, "") for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"))
    hosts = {host.strip() for host in exempt.split(",")}
    if any(environment[name] for name in proxies) and "*" not in hosts and not {"localhost", "127.0.0.1"} <= hosts:
        advice = "add localhost and 127.0.0.1 to no_proxy: Ray talks to itself over them"
        findings.append(Finding("proxy", "warn", f"{', '.join(sorted(proxies))} set", advice))
    return findings or [Finding("environment", "ok", "nothing set that hurts")]
