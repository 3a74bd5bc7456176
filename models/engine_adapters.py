"""The LoRA adapters that a vLLM engine holds: the newest for new requests, older ones for those that began with them.

Every request names an adapter, at first one that changes nothing: in a batch with others, vLLM's CPU build computes
a request without an adapter with the one in its last slot.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contracts.algorithm import LoraConfig
from models.adapters import adapter_shapes, layer_kinds, load_adapter, save_adapter, skeleton

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

# The ranks that vLLM has room for; another one takes the next.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Waits for an answer of the engine core that is named by the second argument.
Answer = Callable[[Awaitable[Any], str], Awaitable[Any]]


@dataclass(frozen=True)
class AdapterSettings:
    """What an engine needs to know of its adapters before it starts.

    `initial` is the folder of the adapter that it begins with, None for one that changes nothing. Requests of up to
    `max_versions` versions run at once; those of one more wait for one of them to end.
    """

    lora: LoraConfig
    initial: str | None = None
    max_versions: int = 2


@dataclass(eq=False)
class Adapter:
    """One version in the engine; its folder lies there for as long as vLLM might read it."""

    version: int
    request: LoRARequest
    folder: Path
    running: int = 0


class EngineAdapters:
    """Adds, serves and removes adapters through vLLM's own loading.

    Args:
        new_folder: where the folder of a version may be written.
    """

    def __init__(
        self, settings: AdapterSettings, model: str, *, llm: AsyncLLM, new_folder: Callable[[int], Path]
    ) -> None:
        self._settings, self._model, self._llm, self._new_folder = settings, model, llm, new_folder
        layers = skeleton(model)
        self.shapes = adapter_shapes(layers, settings.lora)
        self._kinds = layer_kinds(layers, settings.lora.target_modules)
        self._ids = itertools.count(1)
        self._held: list[Adapter] = []  # the last one serves new requests

    @contextmanager
    def newest(self) -> Iterator[Adapter]:
        """The adapter of a request that begins now; kept until the request has ended."""
        adapter = self._held[-1]
        adapter.running += 1
        try:
            yield adapter
        finally:
            adapter.running -= 1

    def initial_tensors(self) -> dict[str, Tensor]:
        return initial_adapter(self._settings, self.shapes)

    async def write(self, version: int, tensors: Mapping[str, Tensor]) -> Adapter:
        """Write the folder of a version; the engine does not know it yet."""
        from vllm.lora.request import LoRARequest

        folder, number = self._new_folder(version), next(self._ids)
        # vLLM knows an adapter by its number, and by its name among cached prefixes: neither is used twice.
        request = LoRARequest(f"version-{version}-{number}", number, str(folder))
        lora = self._settings.lora
        try:
            await asyncio.to_thread(save_adapter, folder, tensors, lora, self._kinds, base=self._model)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Adapter(version, request, folder)

    async def load(self, adapter: Adapter, answer: Answer) -> None:
        """Let vLLM load an adapter; nothing uses it before `serve`."""
        try:
            if not await answer(self._llm.add_lora(adapter.request), "add_lora"):
                raise RuntimeError("vLLM refused the adapter")
        except BaseException:
            shutil.rmtree(adapter.folder, ignore_errors=True)
            raise

    def serve(self, adapter: Adapter) -> None:
        """From now on new requests begin with it."""
        self._held.append(adapter)

    async def drop_unused(self, answer: Answer) -> None:
        """Remove the adapters that no running request began with, but not the newest."""
        for adapter in self._held[:-1]:
            if adapter.running == 0:
                await answer(self._llm.remove_lora(adapter.request.lora_int_id), "remove_lora")
                self._held.remove(adapter)
                shutil.rmtree(adapter.folder, ignore_errors=True)

    def remove_folders(self) -> None:
        for adapter in self._held:
            shutil.rmtree(adapter.folder, ignore_errors=True)


def initial_adapter(settings: AdapterSettings, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What an engine begins with, in bf16, as adapters are published; `shapes` are those of `adapter_shapes`."""
    if settings.initial is None:
        return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return {name: tensor.bfloat16() for name, tensor in load_adapter(Path(settings.initial)).items()}


def vllm_arguments(settings: AdapterSettings, model: str) -> dict[str, Any]:
    """Engine arguments that make room for adapters.

    Raises:
        ValueError: `target_modules` names a layer that the model does not have.
    """
    return {
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in _VLLM_RANKS if rank >= settings.lora.rank),
        "max_loras": settings.max_versions,
        "max_cpu_loras": settings.max_versions + 1,
        # Without the names vLLM wraps every layer that could have an adapter, and computes with zeros there.
        "lora_target_modules": list(layer_kinds(skeleton(model), settings.lora.target_modules)),
    }
