"""Starting vLLM's engine core in a child process, with the environment that it needs."""

from __future__ import annotations

import os
import platform
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engine_files import new_path

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

# What vLLM's workers gain; importing it there registers our way of loading weights.
WORKER = "models.vllm_weights.HeadraceWorker"
# The environment belongs to the process, so engines of one process start one at a time.
_environment_lock = threading.Lock()


def start_vllm(arguments: dict[str, Any], environment: dict[str, str], sockets: Path, on_gpu: bool) -> list[AsyncLLM]:
    """The engine, its sockets in the folder `sockets`, in a list of one: errors that vLLM keeps hold
    this thread's result for ever, and an engine that is still held at interpreter exit fails in its
    finalizer."""
    with _environment_lock, _environment(environment | {"VLLM_RPC_BASE_PATH": str(sockets)}):
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            extra = "gpu" if on_gpu else "cpu"
            raise RuntimeError(f"rollouts need vLLM: pip install 'headrace[{extra}]' ({error})") from error
        if current_platform.is_cpu() == on_gpu:
            built, wanted = ("CPU", "gpu") if on_gpu else ("GPU", "cpu")
            raise RuntimeError(
                f"num_gpus asks for {wanted.upper()} but the installed vLLM is a {built} build: "
                f"pip install 'headrace[{wanted}]' into a fresh environment"
            )
        engine_args = AsyncEngineArgs(
            **arguments,
            # Log-probs after temperature, of the distribution that was sampled from.
            logprobs_mode="processed_logprobs",
            weight_transfer_config={"backend": "headrace-shadow"},  # type: ignore[arg-type]
            worker_extension_cls=WORKER,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        return [AsyncLLM.from_engine_args(engine_args)]


@contextmanager
def sockets_folder() -> Iterator[Path]:
    """A folder for the sockets between vLLM's processes, without which the connections live on: so a kill leaves none.

    vLLM itself would leave them in the temporary folder, under names that tell nobody whose they are. The core says
    that it is ready before it has connected the socket that it answers through, and then a folder that is gone leaves
    it mute: so this ends after its first answer.
    """
    folder = new_path("sockets")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def child_environment(model: str, *, num_gpus: float, threads: int | None, start_timeout_s: float) -> dict[str, str]:
    """Variables that the engine core must find when it starts, beside the inherited ones."""
    values = {
        # A start on CPU warns a dozen times of what is meant to be so.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(start_timeout_s)),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # For vllm_weights.py, which ends the child with us.
        "HEADRACE_ENGINE_OWNER": str(os.getpid()),
    }
    if Path(model).is_dir():
        values["HF_HUB_OFFLINE"] = "1"
    if not num_gpus:
        values |= _cpu_environment(threads or len(os.sched_getaffinity(0)))
    return values


def _cpu_environment(threads: int) -> dict[str, str]:
    # Ray sets OMP_NUM_THREADS to an actor's num_cpus, so it is always overridden.
    values = {
        "OMP_NUM_THREADS": str(threads),
        # Pinned threads of two engines, or of an engine and a learner, would queue on one core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Otherwise vLLM replaces the executor "uni" by "mp" on CPU: one more process to start.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if library := _intel_openmp():
        preloaded = os.environ.get("LD_PRELOAD")
        values["LD_PRELOAD"] = f"{library}:{preloaded}" if preloaded else str(library)
        # Waiting threads sleep at once: spinning ones take the core from a learner beside them. On
        # 2 shared, busy cores 0 gave 400 tokens/s (135M, 32 sequences), 1 ms 180 to 360, 200 ms (the
        # library's default) 220 to 280, and GNU OpenMP, which spins too, 40 to 60.
        values["KMP_BLOCKTIME"] = os.environ.get("KMP_BLOCKTIME", "0")
    return values


def _intel_openmp() -> Path | None:
    if platform.system() != "Linux":
        return None
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "libiomp5.so":
            return Path(str(file.locate())).resolve()
    return None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a child started inside, and undo these and what vLLM sets beside."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
