"""One vLLM engine: generate with log-probs and weight versions, take new weights while running.

vLLM runs its engine core in a child process. The engine_*.py files beside this one and vllm_weights.py (which runs in
that child) are the only ones that import vLLM, and all but the latter import it only when an engine starts.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.engine_adapters import Adapter, AdapterSettings, EngineAdapters, vllm_arguments
from models.engine_core import computed_s
from models.engine_files import new_path, remove_leftovers
from models.engine_requests import Generation, SamplingRequest, generation_of
from models.engine_shadow import Shadow
from models.engine_start import child_environment, sockets_folder, start_vllm
from models.engine_together import add_while_paused, last_output
from models.engine_update import RECOVERY_S, UpdateTimes, WeightsError, answer, exchange, resume_whole
from models.engine_weights import ExpectedWeights, expected_weights

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

T = TypeVar("T")

SHUT_DOWN = "it was shut down"


class Engine:
    """A vLLM engine behind one event loop; all methods must be called on the loop of `start`.

    `version` is the version of the weights it serves. `broken` says why the engine must be
    replaced, None while it is well: after a failed update that left a mixture of weights, or
    once its core has died, it serves nothing any more.

    `shadow_version` is the version that the shadow holds whole: None while an update writes to it,
    after one failed to, and in an engine for adapters. It is not `version` after an update that
    was written and could not be exchanged.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        expected: ExpectedWeights,
        *,
        weights_version: int,
        adapters: EngineAdapters | None = None,
    ) -> None:
        self.version = weights_version
        self.shadow_version: int | None = None
        self.broken: str | None = None
        self._llm = llm
        self._expected = expected
        self._shadow: Shadow | None = None
        self._adapters = adapters
        self._running: set[asyncio.Task[CompletionOutput]] = set()
        # Held here: the loop itself keeps no task alive.
        self._updating: set[asyncio.Task[UpdateTimes]] = set()
        self._num_exchanges = 0
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
        repeatable: bool = False,
        weights_version: int = 0,
        adapters: AdapterSettings | None = None,
        start_timeout_s: float = 600.0,
    ) -> Self:
        """Start the engine core with the weights of `model` (a folder or a hub id).

        With `num_gpus` 0 it runs on CPU with `threads` OpenMP threads (None: all allowed
        cores) and `kv_cache_bytes` for cached states; else on GPUs with
        `gpu_memory_utilization` of their memory. `weights_version` labels the weights of
        `model`; with `adapters`, those of `model` under the initial adapter, and then the
        engine takes adapters and no other weights; any other engine holds its weights a second
        time in shared memory. A `repeatable` one gives the same bits for the same requests if they come
        together (`generate_together`), whatever it did before: no prefix is cached, and no batch is
        formed while another runs. Takes about 10 s on CPU; gives up after `start_timeout_s`.

        Raises ValueError where `adapters` do not fit the model, RuntimeError where vLLM is not
        installed, is the build for other hardware, shared memory is short, or the engine core
        does not come up.
        """
        arguments: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
            "seed": seed,
            "enable_prefix_caching": prefix_caching and not repeatable,
        }
        if repeatable:
            arguments["async_scheduling"] = False
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
        environment = child_environment(model, num_gpus=num_gpus, threads=threads, start_timeout_s=start_timeout_s)
        remove_leftovers()
        with sockets_folder() as sockets:
            # vLLM itself gives up after start_timeout_s; a thread keeps the loop free until then.
            started = await asyncio.to_thread(start_vllm, arguments, environment, sockets, num_gpus > 0)
            llm = started.pop()
            held = EngineAdapters(adapters, model, llm=llm, new_folder=_adapter_folder) if adapters else None
            expected = (
                ExpectedWeights(held.shapes, frozenset(), torch.bfloat16) if held else expected_weights(model, dtype)
            )
            engine = cls(llm, expected, weights_version=weights_version, adapters=held)
            expires = time.monotonic() + start_timeout_s
            try:
                if held is None:
                    await engine._share_shadow(model, expires)
                else:
                    initial = await held.write(weights_version, expected.checked(held.initial_tensors()))
                    await engine._serve_adapter(held, initial, expires)
                rpc = llm.collective_rpc("headrace_set_initial_version", args=(weights_version,))
                await engine._answer(rpc, "set_initial_version", expires)
                label = llm.update_weight_version(str(weights_version))
                await engine._answer(label, "update_weight_version", expires)
            except BaseException:
                engine.shutdown()
                raise
        return engine

    async def _share_shadow(self, model: str, expires: float) -> None:
        """Hold the weights of `model` a second time, where every worker finds them."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        shadow = await asyncio.to_thread(Shadow.create, new_path("shadow"), self._expected, model)
        try:
            request = WeightTransferInitRequest({"path": str(shadow.path)})
            await self._answer(self._llm.init_weight_transfer_engine(request), "init_weight_transfer_engine", expires)
        finally:
            shadow.remove_name()
        self._shadow = shadow
        self.shadow_version = self.version

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
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        salt = await self.accepting()
        request = SamplingRequest(request_id, prompt_tokens, max_tokens, temperature, seed, stop_token_ids)
        params = request.params()
        with self.adapter() as adapter:
            prompt = TokensPrompt(prompt_token_ids=prompt_tokens, cache_salt=salt)
            running = asyncio.ensure_future(self._final_output(prompt, params, request_id, adapter))
            self._running.add(running)
            running.add_done_callback(self._running.discard)
            try:
                return generation_of(await running, adapter)
            except VLLMValidationError as error:
                raise ValueError(str(error)) from error
            except EngineDeadError as error:
                raise self.died(error) from error
            except asyncio.CancelledError:
                if self.broken and running.cancelled():
                    raise WeightsError(f"engine is broken: {self.broken}") from None
                raise

    async def generate_together(
        self, requests: Sequence[SamplingRequest], *, deadline_s: float
    ) -> list[Generation | ValueError]:
        """One response to each request, in batches that depend on the requests and the weights alone.

        The engine core is paused until it has all of them, in their order: then it never waits for one that
        comes later, and the shapes of its batches, to which its last bits are due, repeat with the requests.
        Nothing else may run meanwhile. A prompt that the model cannot take gets a ValueError in its place.

        Waits `deadline_s` for the core to take the requests, and for the responses without a deadline of its own:
        cancelling aborts them. Raises WeightsError once the engine is broken, RuntimeError where it is busy.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        expires = time.monotonic() + deadline_s
        with self.adapter() as adapter:
            try:
                async with self._update_lock:
                    self._raise_if_broken()
                    if self._running:
                        raise RuntimeError(f"{len(self._running)} other requests run: responses would not repeat")
                    lora_request = adapter.request if adapter else None
                    added = await self._add_together(requests, lora_request, expires)
                waiting = [each for each in added if not isinstance(each, ValueError)]
                outputs = iter(await self._together(waiting))
            except EngineDeadError as error:
                raise self.died(error) from error
            return [each if isinstance(each, ValueError) else generation_of(next(outputs), adapter) for each in added]

    @property
    def shadow_tensors(self) -> Mapping[str, Tensor]:
        """All weights by their Hugging Face names (tied ones once), in the engine's dtype.

        Writable views of the shadow, the same ones for the engine's life; write to them only in the
        `write` of `update`. Raises ValueError where the engine was started for adapters.
        """
        if self._shadow is None:
            raise ValueError("this engine was started for adapters and takes nothing else")
        return self._shadow.tensors

    async def update(
        self,
        version: int,
        write: Callable[[Mapping[str, Tensor]], object],
        *,
        deadline_s: float,
        clear_cache: bool = True,
        exchange_in: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    ) -> UpdateTimes:
        """Write new weights to the shadow while generation goes on, then exchange all weights.

        `write` gets `shadow_tensors` in a thread and must leave the weights of `version` there.
        Running requests are kept and go on under the new weights; with `clear_cache` their cached
        states are computed anew, else the old ones are kept. New requests never meet old ones.
        The exchange takes place inside `exchange_in()`, which may wait for requests to finish.

        Waits for a running update, `write`, the pause and the workers, `deadline_s` in all, and is
        not cut short by cancellation; `write` cannot be, and nothing is paused if it takes longer.
        Once the deadline has passed requests go on, or the engine is `broken`, within RECOVERY_S.

        What `write` raises passes through; the engine serves on, and knows the shadow as damaged
        (`shadow_version` None) until the next update, whose `write` has to write all of it. Raises
        ValueError where the engine was started for adapters, WeightsError on any later failure:
        the engine then serves the old weights, or is `broken` where they are lost; never a mixture.
        """
        self._raise_if_broken()
        shadow = self.shadow_tensors
        expires = time.monotonic() + deadline_s
        return await self._finished(self._update(version, shadow, write, expires, clear_cache, exchange_in))

    async def load_weights(
        self,
        version: int,
        tensors: Mapping[str, Tensor | np.ndarray],
        *,
        deadline_s: float,
        clear_cache: bool = True,
    ) -> UpdateTimes:
        """`update` with a whole set of weights.

        `tensors` maps every parameter's Hugging Face name to its whole value, in the engine's
        dtype (bf16 also as NumPy uint16 views); of tied weights one is enough.

        Raises ValueError, with engine and shadow unharmed, where names, shapes or dtypes do not
        fit; else as `update`.
        """
        self._raise_if_broken()
        shadow = self.shadow_tensors
        weights = self._expected.checked(tensors)

        def write(shadow: Mapping[str, Tensor]) -> None:
            for name, weight in weights.items():
                shadow[name].copy_(weight)

        expires = time.monotonic() + deadline_s
        return await self._finished(self._update(version, shadow, write, expires, clear_cache))

    async def load_adapter(
        self, version: int, tensors: Mapping[str, Tensor | np.ndarray], *, deadline_s: float
    ) -> UpdateTimes:
        """Serve another adapter. vLLM stands still while it loads it; there is no pause.

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
        return await self._finished(self._update_adapter(self._adapters, version, adapter, expires))

    @property
    def takes_adapters(self) -> bool:
        """Whether it was started for adapters, and takes nothing else."""
        return self._adapters is not None

    @property
    def llm(self) -> AsyncLLM:
        """For vLLM's own request handlers, which have to ask `accepting` first, and to name `adapter`."""
        return self._llm

    @contextmanager
    def adapter(self) -> Iterator[Adapter | None]:
        """What a request has to name that begins now and ends inside; None in an engine without adapters."""
        with self._adapters.newest() if self._adapters else nullcontext() as adapter:
            yield adapter

    async def accepting(self) -> str:
        """Wait for as long as weights are exchanged; the salt for the prompt of a request that begins now.

        It keeps prefixes cached before an exchange apart. A version would not do: its requests go on under the
        next one's weights and cache that mixture, and a rollback serves it again.

        Raises WeightsError once the engine is broken.
        """
        await self._accepting.wait()
        self._raise_if_broken()
        return f"exchange-{self._num_exchanges}"

    def died(self, error: BaseException) -> WeightsError:
        """Remember that the core has died of `error`; what to raise instead."""
        self._break(f"its core died: {error}")
        return WeightsError(f"engine is broken: {self.broken}")

    def num_running(self) -> int:
        """Requests not finished yet, waiting ones included."""
        return len(self._running)

    async def ping(self) -> None:
        """One round trip to the engine core, which answers between two of its steps; waits for as long as it lives.

        Raises WeightsError once the engine is broken: its core has died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        self._raise_if_broken()
        try:
            await self._answer(self._llm.get_weight_version(), "get_weight_version", math.inf)
        except EngineDeadError as error:
            raise self.died(error) from error

    def core_computed_s(self) -> float:
        """CPU seconds that the engine core and its workers have used."""
        manager: Any = self._llm.engine_core.resources.engine_manager
        return computed_s([process.pid for process in manager.processes])

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
        self, prompt: TokensPrompt, params: SamplingParams, request_id: str, adapter: Adapter | None
    ) -> CompletionOutput:
        lora_request = adapter.request if adapter else None
        async for output in self._llm.generate(prompt, params, request_id, lora_request=lora_request):
            if output.finished:
                return output.outputs[0]
        raise RuntimeError(f"request {request_id} ended without an output")

    async def _add_together(
        self, requests: Sequence[SamplingRequest], lora_request: LoRARequest | None, expires: float
    ) -> list[RequestOutputCollector | ValueError]:
        """Where it fails in the middle the core may stay paused, so that the engine is broken then."""
        try:
            return await add_while_paused(self._llm, requests, lora_request=lora_request, expires=expires)
        except BaseException as error:
            self._break(f"requests that came together did not reach its core: {error!r}")
            if isinstance(error, WeightsError):
                raise WeightsError(f"engine is broken: {self.broken}") from error
            raise

    async def _together(self, added: Sequence[RequestOutputCollector]) -> list[CompletionOutput]:
        """The last output of each, counted as running until then."""
        tasks = [asyncio.ensure_future(last_output(collector)) for collector in added]
        for task in tasks:
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        try:
            return await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if self.broken:
                raise WeightsError(f"engine is broken: {self.broken}") from None
            abort = self._llm.abort([collector.request_id for collector in added], internal=True)
            await self._answer(abort, "abort", time.monotonic() + RECOVERY_S)
            raise
        finally:
            for task in tasks:
                task.cancel()

    async def _finished(self, update: Coroutine[Any, Any, UpdateTimes]) -> UpdateTimes:
        """Runs an update to its end, also where the caller is cancelled: a resume must not get lost."""
        task = asyncio.ensure_future(update)
        self._updating.add(task)
        task.add_done_callback(self._updating.discard)
        return await asyncio.shield(task)

    async def _update(
        self,
        version: int,
        shadow: Mapping[str, Tensor],
        write: Callable[[Mapping[str, Tensor]], object],
        expires: float,
        clear_cache: bool,
        exchange_in: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    ) -> UpdateTimes:
        async with self._update_lock:
            self._raise_if_broken()
            began = time.monotonic()
            if began > expires:
                raise WeightsError(f"weights {version} not loaded: the deadline passed before its turn")
            self.shadow_version = None
            await asyncio.to_thread(write, shadow)
            self.shadow_version = version
            written = time.monotonic()
            if written > expires:
                late = f"weights {version} not loaded: written {written - expires:.1f} s after the deadline"
                raise WeightsError(f"{late} (still serving version {self.version})")
            async with exchange_in():
                self._accepting.clear()
                self._num_exchanges += 1
                try:
                    pause_s, load_s, resume_s = await self._exchange(version, expires, clear_cache)
                finally:
                    self._accepting.set()
            return UpdateTimes(written - began, pause_s, load_s, resume_s)

    async def _exchange(self, version: int, expires: float, clear_cache: bool) -> tuple[float, float, float]:
        """However it ends, requests go on under one whole set of weights, or the engine is broken."""
        began = time.monotonic()
        try:
            times = await exchange(self._llm, version, expires=expires, clear_cache=clear_cache)
            self.version = version
            return times
        # vLLM passes a worker's error on as a bare Exception.
        except (Exception, asyncio.CancelledError) as error:
            try:
                self.version = await resume_whole(self._llm, {self.version, version})
            except Exception as lost:  # noqa: BLE001 whatever it is, the weights are unproven
                self._break(f"after a failed update: {lost}")
            if isinstance(error, asyncio.CancelledError):
                raise
            if self.broken or self.version != version:
                outcome = self.broken or f"still serving version {self.version}"
                raise WeightsError(f"weights {version} not loaded: {error} ({outcome})") from error
            # Only an answer was lost.
            return 0.0, 0.0, time.monotonic() - began

    async def _update_adapter(
        self, held: EngineAdapters, version: int, tensors: dict[str, Tensor], expires: float
    ) -> UpdateTimes:
        async with self._update_lock:
            self._raise_if_broken()
            began = time.monotonic()
            try:
                adapter = await held.write(version, tensors)
                write_s = time.monotonic() - began
                load_s = await self._serve_adapter(held, adapter, expires)
            # vLLM passes a worker's error on as a bare Exception.
            except Exception as error:
                if self._llm.errored:
                    self._break(f"its core died: {error}")
                outcome = self.broken or f"serving version {self.version}"
                raise WeightsError(f"adapter {version} not loaded: {error} ({outcome})") from error
            return UpdateTimes(write_s, pause_s=0.0, load_s=load_s, resume_s=0.0)

    async def _serve_adapter(self, held: EngineAdapters, adapter: Adapter, expires: float) -> float:
        async def answer_in_time(awaitable: Awaitable[T], call: str) -> T:
            return await self._answer(awaitable, call, expires)

        began = time.monotonic()
        await held.load(adapter, answer_in_time)
        load_s = time.monotonic() - began
        # Only check_health reads this label: it is one for the whole engine, and requests differ.
        await answer_in_time(self._llm.update_weight_version(str(adapter.version)), "update_weight_version")
        held.serve(adapter)
        self.version = adapter.version
        await held.drop_unused(answer_in_time)
        return load_s

    def _break(self, reason: str) -> None:
        self.broken = reason
        for running in list(self._running):
            running.cancel()

    def _raise_if_broken(self) -> None:
        if self.broken:
            raise WeightsError(f"engine is broken: {self.broken}")

    async def _answer(self, awaitable: Awaitable[T], call: str, expires: float) -> T:
        return await answer(self._llm, awaitable, call, expires)


def _adapter_folder(version: int) -> Path:
    return new_path(f"adapter-{version}")
