"""The two servers: `headrace serve`, and vLLM's own with the same options of the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from models import bundled
from models.engine_start import child_environment
from tests.command import Command, Processes
from tests.head import free_ports
from tests.tiny import build_tiny_model

START_S = 400.0
NAME = "policy"
_JUDGE = "def length(prompts, responses):\n    return [float(len(response)) for response in responses]\n"


@dataclass(frozen=True)
class Model:
    """What is served, and how long prompt and answer may be together, in tokens."""

    folder: str
    context: int


@dataclass
class Server:
    """A server that answers: its address, and its processes."""

    url: str
    processes: Processes
    run_dir: Path

    def get(self, path: str, *, timeout_s: float = 30.0) -> Any:
        """The JSON document at `path`."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout_s) as answer:
            return json.load(answer)

    @property
    def ray_address(self) -> str:
        """Of its Ray, for drivers that join; `auto` would find any cluster of this machine."""
        (raylet,) = (process for process in self.processes.alive() if role(process) == "raylet")
        (address,) = (part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--gcs-address="))
        return address

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that its processes have used, by what they are."""
        used: defaultdict[str, float] = defaultdict(float)
        for process in self.processes.alive():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            used[role(process)] += times.user + times.system
        return dict(used)


def find_model(path: str, folder: Path) -> Model:
    """`tiny`, or what `model.path` takes."""
    if path == "tiny":
        return Model(str(build_tiny_model(folder / "tiny", tied=True)), 256)
    return Model(bundled.resolve(path), 1024)


@contextmanager
def headrace(model: Model, folder: Path, *, threads: int | None = None, **serving: Any) -> Iterator[Server]:
    """`headrace serve` on a free port; afterwards nothing of it is left."""
    (port,) = free_ports(1)
    folder.mkdir()
    (folder / "judge_of_benchmark.py").write_text(_JUDGE, encoding="utf-8")
    replicas = {"num_cpus": 0.5, "threads": threads} | serving.pop("replicas", {})
    config = {
        "output_dir": "run",
        "model": {"path": model.folder, "max_context_tokens": model.context},
        "prompts": {"path": "none.jsonl"},
        "rewards": [{"name": "length", "function": "judge_of_benchmark:length"}],
        "reward_workers": {"num_cpus": 0.1, "threads": 1},
        "sampling": {"max_response_tokens": 16},
        "serving": {"port": port, "name": NAME, "replicas": replicas} | serving,
        "ray": {"dashboard": False, "object_store_gib": 1.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    with Command("serve", "config.yaml", cwd=folder) as command:
        command.until(lambda: f"{url}/v1" in command.output, "its address")
        print(f"`headrace serve` was ready after {command.seconds:.0f} s", file=sys.stderr, flush=True)
        yield Server(url, command.processes, folder / "run")
        command.ctrl_c()
        command.status()


@contextmanager
def vllm_server(
    model: Model, folder: Path, *, max_running: int, kv_cache_gib: float, threads: int | None = None
) -> Iterator[Server]:
    """vLLM's OpenAI server, with the engine of `models.engine.Engine.start` and its environment."""
    (port,) = free_ports(1)
    processes = Processes()
    folder.mkdir()
    options = {
        "model": model.folder,
        "served-model-name": NAME,
        "host": "127.0.0.1",
        "port": port,
        "dtype": "bfloat16",
        "max-model-len": model.context,
        "max-num-seqs": max_running,
        "max-num-batched-tokens": max(2048, model.context),
        "distributed-executor-backend": "uni",
        "kv-cache-memory-bytes": int(kv_cache_gib * 2**30),
    }
    flags = ["enforce-eager", "no-enable-chunked-prefill", "disable-log-stats", "disable-uvicorn-access-log"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *(f"--{flag}" for flag in flags)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = child_environment(model.folder, num_gpus=0, threads=threads, start_timeout_s=START_S)
    environment.pop("HEADRACE_ENGINE_OWNER")
    began = time.monotonic()
    with (folder / "vllm.log").open("wb") as log:
        popen = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment | processes.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", processes, folder)
    try:
        _until_answers(server, popen, folder / "vllm.log")
        print(f"vLLM's server was ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        yield server
    finally:
        popen.terminate()
        try:
            popen.wait(60)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait(30)
        processes.wait_gone(10)


def role(process: psutil.Process) -> str:
    """What a process of a server is, from its title."""
    title = " ".join(process.cmdline())
    if title.startswith("ray::ServeReplica:"):
        return title.split()[0].rsplit(":", 1)[-1].partition(".")[0]  # without the method that runs
    for part, what in _ROLES.items():
        if part in title:
            return what
    return "other"


_ROLES = {
    "EngineCore": "engine core",
    "ray::Proxy": "HTTP proxy",
    "ray::ServeController": "Serve controller",
    "gcs_server": "Ray's gcs",
    "raylet/raylet": "raylet",
    "api_server": "API server",
    "headrace": "the command",
    "ray::": "other of Ray",
    "ray/": "other of Ray",
}


def _until_answers(server: Server, popen: subprocess.Popen[bytes], log: Path) -> None:
    expires = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=20):
                return
        except OSError:
            pass
        said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        assert popen.poll() is None, f"vLLM's server ended:\n{said}"
        assert time.monotonic() < expires, f"vLLM's server was not ready after {START_S:g} s:\n{said}"
        time.sleep(0.3)
