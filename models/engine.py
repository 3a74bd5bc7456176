"""One vLLM engine: generate with log-probs and weight versions, take new weights while running.

vLLM runs its engine core in a child process. Here and in vllm_weights.py (which runs in that
child) are the only imports of vLLM, and this module imports it only when an engine starts.
"""

import asyncio
import gc
import os
import platform
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from models.engine_adapters import Adapter, AdapterSettings, EngineAdapters, vllm_arguments

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams, TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

WEIGHTS_FILE_PREFIX = "headrace-weights-"
# After a failed update: how long the engine core may take to say which weights it holds.
RECOVERY_S = 20.0
SHUT_DOWN = "it was shut down"
# The environment belongs to the process, so engines of one process start one at a time.
_environment_lock = threading.Lock()


class WeightsError(RuntimeError):
    """An update of the weights failed, or the engine is broken by an earlier failure."""


@dataclass(frozen=True)
class Generation:
    """One response. The three lists have one entry per token, sampled ones only: an EOS that
    the policy sampled is the last token, a response cut at its limit has none.

    `behavior_logprobs` are natural logs after temperature, under the weights named by
    `weights_versions`. `finish_reason` is "stop" (EOS or a stop token), "length" or "abort".
    """

    response_tokens: list[int]
    behavior_logprobs: list[float]
    weights_versions: list[int]
    finish_reason: str


class Engine:
    """A vLLM engine behind one event loop; all methods must be called on the loop of `start`.

    `version` is the version of the weights it serves. `broken` says why the engine must be
    replaced, None while it is well: after a failed update that left a mixture of weights, or
    once its core has died, it serves nothing any more.
    """

    def __init__(
        self,
        llm: "AsyncLLM",
        expected: "ExpectedWeights",
        *,
        weights_version: int,
        adapters: EngineAdapters | None = None,
    ) -> None:
        self.version = weights_version
        self.broken: str | None = None
        self._llm = llm
        self._expected = expected
        self._adapters = adapters
        self._running: set[asyncio.Task[CompletionOutput]] = set()
        self._update_lock = asyncio.Lock()
        # New requests wait while weights are exchanged: a prompt must not meet cached states of
        # one version under the name of another.
        self._accepting = asyncio.Event()
        self._accepting.set()

    @classmethod
    async def start(
        cls,
        model: str,
        *,
        max_model_len: int,
        dtype: str = "bfloat16",
        max_num_seqs: int = 64,
        tensor_parallel_size: int = 1,
        num_gpus: float = 0.0,
        gpu_memory_utilization: float = 0.9,
        kv_cache_bytes: int = 1 << 30,
        threads: int | None = None,
        seed: int = 0,
        prefix_caching: bool = True,
        weights_version: int = 0,
        adapters: AdapterSettings | None = None,
        start_timeout_s: float = 600.0,
    ) -> Self:
        """Start the engine core with the weights of `model` (a folder or a hub id).

        With `num_gpus` 0 it runs on CPU with `threads` OpenMP threads (None: all allowed
        cores) and `kv_cache_bytes` for cached states; else on GPUs with
        `gpu_memory_utilization` of their memory. `weights_version` labels the weights of
        `model`; with `adapters`, those of `model` under the initial adapter, and then the
        engine takes adapters and no other weights. Takes about 10 s on CPU; gives up after
        `start_timeout_s`.

        Raises ValueError where `adapters` do not fit the model, RuntimeError where vLLM is not
        installed, is the build for other hardware, or the engine core does not come up.
        """
        arguments: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
            "seed": seed,
            "enable_prefix_caching": prefix_caching,
        }
        if num_gpus:
            arguments["gpu_memory_utilization"] = gpu_memory_utilization
        else:
            arguments |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": kv_cache_bytes,
                # A prompt cut into chunks kills vLLM's engine core on CPU when its request has a seed: it
                # rewinds the generator, and "CPU Generator does not use offset".
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(2048, max_model_len),
            }
        if adapters is not None:
            arguments |= vllm_arguments(adapters, model)
        environment = _child_environment(model, num_gpus=num_gpus, threads=threads, start_timeout_s=start_timeout_s)
        remove_leftovers()
        # vLLM itself gives up after start_timeout_s; a thread keeps the loop free until then.
        started = await asyncio.to_thread(_start_vllm, arguments, environment, num_gpus > 0)
        llm = started.pop()
        held = EngineAdapters(adapters, model, llm=llm, new_folder=_adapter_folder) if adapters else None
        expected = ExpectedWeights(held.shapes, frozenset(), torch.bfloat16) if held else expected_weights(model, dtype)
        engine = cls(llm, expected, weights_version=weights_version, adapters=held)
        expires = time.monotonic() + start_timeout_s
        if held is not None:
            initial = await held.write(weights_version, expected.checked(held.initial_tensors()))
            await engine._serve_adapter(held, initial, expires)
        rpc = llm.collective_rpc("headrace_set_initial_version", args=(weights_version,))
        await engine._answer(rpc, "set_initial_version", expires)
        label = llm.update_weight_version(str(weights_version))
        await engine._answer(label, "update_weight_version", expires)
        return engine

    async def generate(
        self,
        prompt_tokens: list[int],
        *,
        request_id: str,
        max_tokens: int,
        temperature: float,
        seed: int | None = None,
        stop_token_ids: list[int] | None = None,
    ) -> Generation:
        """Sample one response; nothing but temperature shapes the distribution.

        At temperature 0 it is greedy and log-probs are those of temperature 1. With `seed` the
        sampling noise repeats. Waits until the response is finished and has no deadline of its
        own: bound it with a lease or `asyncio.wait_for`; cancelling aborts the request.

        Raises ValueError for a prompt the model cannot take, WeightsError once the engine is
        broken: its weights are lost, or its core has died.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        await self._accepting.wait()
        self._raise_if_broken()
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=stop_token_ids,
            # Top-p and top-k would renormalise the log-probs; the trainer's are not.
            top_p=1.0,
            top_k=0,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        with self._adapters.newest() if self._adapters else nullcontext() as adapter:
            version = adapter.version if adapter else self.version
            # The salt keeps prefixes cached under older weights apart.
            prompt = TokensPrompt(prompt_token_ids=prompt_tokens, cache_salt=f"v{version}")
            running = asyncio.ensure_future(self._final_output(prompt, params, request_id, adapter))
            self._running.add(running)
            running.add_done_callback(self._running.discard)
            try:
                return _generation(await running, adapter)
            except EngineDeadError as error:
                self._break(f"its core died: {error}")
                raise WeightsError(f"engine is broken: {self.broken}") from error
            except asyncio.CancelledError:
                if self.broken and running.cancelled():
                    raise WeightsError(f"engine is broken: {self.broken}") from None
                raise

    async def load_weights(
        self,
        version: int,
        tensors: "Mapping[str, torch.Tensor | np.ndarray]",
        *,
        deadline_s: float,
        clear_cache: bool = True,
    ) -> float:
        """Exchange all weights and return the wall seconds in which requests were held.

        `tensors` maps every parameter's Hugging Face name to its whole value, in the engine's
        dtype (bf16 also as NumPy uint16 views); of tied weights one is enough. Running requests
        are kept and go on under the new weights; with `clear_cache` their cached states are
        computed anew.

        Waits for a running update, the pause and the workers, `deadline_s` in all, and is not
        cut short by cancellation. Raises ValueError, with the engine unharmed, where names,
        shapes or dtypes do not fit. Raises WeightsError on any later failure: the engine then
        serves the old weights, or is `broken` where they are lost; never a mixture.
        """
        self._raise_if_broken()
        if self._adapters is not None:
            raise ValueError(f"weights {version}: this engine was started for adapters and takes nothing else")
        weights = self._expected.checked(tensors)
        expires = time.monotonic() + deadline_s
        update = asyncio.ensure_future(self._update(version, weights, expires, clear_cache))
        return await asyncio.shield(update)

    async def load_adapter(
        self, version: int, tensors: "Mapping[str, torch.Tensor | np.ndarray]", *, deadline_s: float
    ) -> float:
        """Serve another adapter and return the wall seconds in which vLLM loaded it and stood still.

        `tensors` is the whole adapter by PEFT's names in bf16 (also as NumPy uint16 views). Requests
        that run go on with the adapter they began with, and all their tokens keep its version.

        Waits `deadline_s` in all and is not cut short by cancellation. Raises ValueError where names,
        shapes or dtypes do not fit, or the engine was started without adapters, and WeightsError on
        any later failure; the engine serves the old version then.
        """
        self._raise_if_broken()
        if self._adapters is None:
            raise ValueError(f"adapter {version}: this engine was started without adapters")
        adapter = self._expected.checked(tensors)
        expires = time.monotonic() + deadline_s
        return await asyncio.shield(self._update_adapter(self._adapters, version, adapter, expires))

    def num_running(self) -> int:
        """Requests not finished yet, waiting ones included."""
        return len(self._running)

    async def check_health(self, *, deadline_s: float = 30.0) -> None:
        """Ask the engine core which weights it serves.

        Raises WeightsError when it is broken, silent for `deadline_s` or serves another version
        than `self.version`, vLLM's EngineDeadError when it died.
        """
        self._raise_if_broken()
        await self._llm.check_health()
        expires = time.monotonic() + deadline_s
        async with self._update_lock:
            label = await self._answer(self._llm.get_weight_version(), "get_weight_version", expires)
        if label != str(self.version):
            raise WeightsError(f"engine core serves weights {label}, expected {self.version}")

    def shutdown(self) -> None:
        """End the engine core; running requests fail."""
        if self.broken != SHUT_DOWN:
            self._break(SHUT_DOWN)
            self._llm.shutdown(timeout=5)
            if self._adapters is not None:
                self._adapters.remove_folders()
                self._adapters = None  # it holds the engine too
            # Its finalizer shuts down again, and prints an error if left to interpreter exit.
            del self._llm
            gc.collect()

    async def _final_output(
        self, prompt: "TokensPrompt", params: "SamplingParams", request_id: str, adapter: Adapter | None
    ) -> "CompletionOutput":
        lora_request = adapter.request if adapter else None
        async for output in self._llm.generate(prompt, params, request_id, lora_request=lora_request):
            if output.finished:
                return output.outputs[0]
        raise RuntimeError(f"request {request_id} ended without an output")

    async def _update(self, version: int, weights: dict[str, torch.Tensor], expires: float, clear_cache: bool) -> float:
        async with self._update_lock:
            self._raise_if_broken()
            path = _weights_path(version)
            try:
                # Written before the pause: requests are held for the exchange alone.
                await asyncio.to_thread(save_file, weights, path)
                self._accepting.clear()
                return await self._exchange(version, path, expires, clear_cache)
            finally:
                self._accepting.set()
                path.unlink(missing_ok=True)

    async def _update_adapter(
        self, held: EngineAdapters, version: int, tensors: dict[str, torch.Tensor], expires: float
    ) -> float:
        async with self._update_lock:
            self._raise_if_broken()
            try:
                adapter = await held.write(version, tensors)
                return await self._serve_adapter(held, adapter, expires)
            # vLLM passes a worker's error on as a bare Exception.
            except Exception as error:
                if self._llm.errored:
                    self._break(f"its core died: {error}")
                outcome = self.broken or f"serving version {self.version}"
                raise WeightsError(f"adapter {version} not loaded: {error} ({outcome})") from error

    async def _serve_adapter(self, held: EngineAdapters, adapter: Adapter, expires: float) -> float:
        async def answer(awaitable: Awaitable[T], call: str) -> T:
            return await self._answer(awaitable, call, expires)

        began = time.monotonic()
        await held.load(adapter, answer)
        held_s = time.monotonic() - began
        # Only check_health reads this label: it is one for the whole engine, and requests differ.
        await answer(self._llm.update_weight_version(str(adapter.version)), "update_weight_version")
        held.serve(adapter)
        self.version = adapter.version
        await held.drop_unused(answer)
        return held_s

    async def _exchange(self, version: int, path: Path, expires: float, clear_cache: bool) -> float:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self._llm
        request = WeightTransferUpdateRequest({"path": str(path), "version": version})
        held_since = time.monotonic()
        try:
            pause = llm.pause_generation(mode="keep", clear_cache=clear_cache)
            await self._answer(pause, "pause_generation", expires)
            await self._answer(llm.start_weight_update(), "start_weight_update", expires)
            await self._answer(llm.update_weights(request), "update_weights", expires)
            finish = llm.finish_weight_update(weight_version=str(version))
            await self._answer(finish, "finish_weight_update", expires)
        # vLLM passes a worker's error on as a bare Exception.
        except Exception as error:
            await self._resume_whole_weights()
            outcome = self.broken or f"still serving version {self.version}"
            raise WeightsError(f"weights {version} not loaded: {error} ({outcome})") from error
        self.version = version
        try:
            expires = max(expires, time.monotonic() + RECOVERY_S)
            await self._answer(llm.resume_generation(), "resume_generation", expires)
        except Exception as error:
            self._break(f"did not resume with weights {version}: {error}")
            raise WeightsError(f"engine is broken: {self.broken}") from error
        return time.monotonic() - held_since

    async def _resume_whole_weights(self) -> None:
        """After a failure: resume if every worker still holds the old weights, else break."""
        expires = time.monotonic() + RECOVERY_S
        try:
            rpc = self._llm.collective_rpc("headrace_loaded_version")
            versions = await self._answer(rpc, "loaded_version", expires)
            if set(versions) == {self.version}:
                await self._answer(self._llm.resume_generation(), "resume_generation", expires)
            else:
                self._break(f"workers hold weights {versions}, not {self.version}")
        except Exception as error:  # noqa: BLE001 whatever it is, the weights are unproven
            self._break(f"no answer after a failed update: {error}")

    def _break(self, reason: str) -> None:
        self.broken = reason
        for running in list(self._running):
            running.cancel()

    def _raise_if_broken(self) -> None:
        if self.broken:
            raise WeightsError(f"engine is broken: {self.broken}")

    async def _answer(self, awaitable: Awaitable[T], call: str, expires: float) -> T:
        """The engine core's answer to `call`, or an error: WeightsError when `expires`
        (monotonic seconds) has passed, EngineDeadError when the core has died."""
        answer = asyncio.ensure_future(awaitable)
        try:
            while (remaining_s := expires - time.monotonic()) > 0:
                # vLLM leaves a call to a core that dies unanswered, so look after it meanwhile.
                done, _ = await asyncio.wait({answer}, timeout=min(remaining_s, 0.5))
                if done:
                    return answer.result()
                if self._llm.errored:
                    raise self._llm.dead_error
        finally:
            answer.cancel()
        raise WeightsError(
            f"vLLM's engine core (child of process {os.getpid()}) did not answer {call} before the deadline"
        )


def _generation(output: "CompletionOutput", adapter: Adapter | None) -> Generation:
    tokens = list(output.token_ids)
    logprobs = [choices[token].logprob for token, choices in zip(tokens, output.logprobs or [], strict=True) if choices]
    versions: list[int] = []
    for span in output.weight_versions or []:
        versions += [adapter.version if adapter else int(span.version)] * (span.end - span.start)
    # Short lists would shift log-probs or versions to other tokens.
    assert len(tokens) == len(logprobs) == len(versions), (tokens, logprobs, versions)
    return Generation(tokens, logprobs, versions, output.finish_reason or "abort")


@dataclass(frozen=True)
class ExpectedWeights:
    """What a full set of weights consists of: shapes by name, and one dtype."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    dtype: torch.dtype

    def checked(self, tensors: "Mapping[str, torch.Tensor | np.ndarray]") -> dict[str, torch.Tensor]:
        """The tensors to send, tied copies left out; ValueError names the first misfit."""
        weights = {name: _as_tensor(value, self.dtype) for name, value in tensors.items() if name not in self.tied}
        missing = sorted(self.shapes.keys() - weights.keys())
        unknown = sorted(weights.keys() - self.shapes.keys())
        if missing or unknown:
            raise ValueError(
                f"weights do not fit the model: {len(missing)} missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]}"
            )
        for name, weight in weights.items():
            if tuple(weight.shape) != self.shapes[name] or weight.dtype != self.dtype:
                raise ValueError(
                    f"weight {name} is {weight.dtype} {tuple(weight.shape)}, expected {self.dtype} {self.shapes[name]}"
                )
        return weights


def expected_weights(model: str, dtype: str) -> ExpectedWeights:
    """Names and shapes from the model's config, without loading or allocating weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    every = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
    buffers = {name for name, _ in skeleton.named_buffers()}
    # named_parameters lists a tied weight once, state_dict under each of its names.
    once = {name for name, _ in skeleton.named_parameters()} | buffers
    shapes = {name: shape for name, shape in every.items() if name in once}
    return ExpectedWeights(shapes, frozenset(every.keys() - once), getattr(torch, dtype))


def _as_tensor(value: "torch.Tensor | np.ndarray", dtype: torch.dtype) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous()
    with warnings.catch_warnings():
        # Arrays in Ray's object store are read-only; we only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.ascontiguousarray(value))
    # NumPy has no bf16.
    is_bf16_view = value.dtype == np.uint16 and dtype == torch.bfloat16
    return tensor.view(torch.bfloat16) if is_bf16_view else tensor


def weights_folder() -> Path:
    """Where files for the engine core lie: in memory where the system offers that."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def _weights_path(version: int) -> Path:
    name = f"{WEIGHTS_FILE_PREFIX}{os.getpid()}-{version}-{time.monotonic_ns()}.safetensors"
    return weights_folder() / name


def _adapter_folder(version: int) -> Path:
    return _weights_path(version).with_suffix("")


def remove_leftovers() -> None:
    """Delete the weights files and folders of processes that were killed in the middle of an update."""
    for path in weights_folder().glob(f"{WEIGHTS_FILE_PREFIX}*"):
        pid = path.name.removeprefix(WEIGHTS_FILE_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _start_vllm(arguments: dict[str, Any], environment: dict[str, str], on_gpu: bool) -> "list[AsyncLLM]":
    """The engine in a list of one: errors that vLLM keeps hold this thread's result for ever, and
    an engine that is still held at interpreter exit fails in its finalizer."""
    with _environment_lock, _environment(environment):
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
            weight_transfer_config={"backend": "headrace-file"},  # type: ignore[arg-type]
            worker_extension_cls="models.vllm_weights.HeadraceWorker",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        return [AsyncLLM.from_engine_args(engine_args)]


def _child_environment(model: str, *, num_gpus: float, threads: int | None, start_timeout_s: float) -> dict[str, str]:
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
