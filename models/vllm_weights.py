"""The worker's side of `Engine.load_weights`: runs inside vLLM's worker processes.

Naming `HeadraceWorker` as vLLM's worker_extension_cls imports this module in every worker
before the model loads, which registers the weight transfer backend.
"""

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

BACKEND = "headrace-file"
OWNER_VARIABLE = "HEADRACE_ENGINE_OWNER"


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: every update names its own file."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One update: all weights, in checkpoint names and full shapes, as a safetensors file."""

    path: str
    version: int


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads a whole set of weights from a safetensors file on this machine.

    `loaded_version` is the version whose weights the model holds, None while it holds a
    mixture: set only after the last layer is in place.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    loaded_version: int | None = None

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def set_initial_version(self, version: int) -> None:
        self.loaded_version = version

    def start_weight_update(self) -> None:
        # Nothing yet: an unreadable file must be found before the model is touched.
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():  # the base class synchronises unconditionally
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        with safe_open(update_info.path, framework="pt") as file:
            names = list(file.keys())
            self.loaded_version = None
            initialize_layerwise_reload(self.model)
            load_weights: Any = self.model.load_weights
            load_weights((name, file.get_tensor(name)) for name in names)
            finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_lm_heads(self.model)
        self.loaded_version = update_info.version

    def finish_weight_update(self) -> None:
        if self.loaded_version is None:
            raise RuntimeError("finish_weight_update before the weights were loaded")

    def shutdown(self) -> None:
        pass


def repack_lm_heads(model: torch.nn.Module) -> None:
    """Pack the output layers again from their current weights.

    On CPU the packed copy of an lm_head tied to the embedding is not renewed by the layerwise
    reload: the file names no lm_head, so nothing "loads" it, and the engine would sample from
    new hidden states and old output weights.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def end_with(owner_pid: int) -> None:
    """Exit as soon as the process `owner_pid` is gone.

    vLLM's engine core outlives an owner that was killed, with all its memory. Where the workers
    are processes of their own, the core notices that they ended and ends too.
    """

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(owner_pid).wait()
        os._exit(1)

    threading.Thread(target=watch, name="headrace-owner-watch", daemon=True).start()


class HeadraceWorker:
    """Methods that vLLM's workers gain, for collective_rpc."""

    weight_transfer_engine: FileWeightTransfer

    def headrace_set_initial_version(self, version: int) -> None:
        self.weight_transfer_engine.set_initial_version(version)

    def headrace_loaded_version(self) -> int | None:
        return self.weight_transfer_engine.loaded_version


WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)
if owner := os.environ.get(OWNER_VARIABLE):
    end_with(int(owner))
