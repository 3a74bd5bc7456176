"""The worker's side of `Engine.update`: runs inside vLLM's worker processes.

Naming `HeadraceWorker` as vLLM's worker_extension_cls imports this module in every worker
before the model loads, which registers the weight transfer backend.
"""

import contextlib
import ctypes
import os
import platform
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from models.engine_shadow import mapped_for_reading

BACKEND = "headrace-shadow"
OWNER_VARIABLE = "HEADRACE_ENGINE_OWNER"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class ShadowInitInfo(WeightTransferInitInfo):
    """Where the engine's shadow lies until every worker has mapped it."""

    path: str


@dataclass
class ShadowUpdateInfo(WeightTransferUpdateInfo):
    """One update: the shadow holds the weights of `version`, whole."""

    version: int


class ShadowWeightTransfer(WeightTransferEngine[ShadowInitInfo, ShadowUpdateInfo]):
    """Loads a whole set of weights from the engine's shadow.

    `loaded_version` is the version whose weights the model holds, None while it holds a
    mixture: set only after the last layer is in place.
    """

    init_info_cls = ShadowInitInfo
    update_info_cls = ShadowUpdateInfo

    loaded_version: int | None = None

    def init_transfer_engine(self, init_info: ShadowInitInfo) -> None:
        self._shadow = mapped_for_reading(Path(init_info.path))

    def set_initial_version(self, version: int) -> None:
        self.loaded_version = version

    def start_weight_update(self) -> None:
        # The reload begins where its failure can be told: in receive_weights.
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():  # the base class synchronises unconditionally
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ShadowUpdateInfo) -> None:
        self.loaded_version = None
        initialize_layerwise_reload(self.model)
        load_weights: Any = self.model.load_weights
        load_weights(self._shadow.items())
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            renew_tied_heads(self.model)
        self.loaded_version = update_info.version

    def finish_weight_update(self) -> None:
        if self.loaded_version is None:
            raise RuntimeError("finish_weight_update before the weights were loaded")

    def shutdown(self) -> None:
        pass


def renew_tied_heads(model: torch.nn.Module) -> None:
    """Let every output layer that is tied to an embedding compute with the embedding's packed weights.

    On CPU the packed copy of such a layer is not renewed by the layerwise reload: no weight has its
    name, so nothing "loads" it, and the engine would sample from new hidden states and old output
    weights. The embedding, whose weights are the same, has just been packed.
    """
    embeddings = {
        id(module.weight): module
        for module in model.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    for head in model.modules():
        if isinstance(head, ParallelLMHead) and id(head.weight) in embeddings:
            head.cpu_linear = embeddings[id(head.weight)].cpu_linear


def end_with(owner_pid: int) -> None:
    """Exit as soon as the process `owner_pid` is gone.

    vLLM's engine core outlives an owner that was killed, with all its memory. Where the workers
    are processes of their own, the core notices that they ended and ends too. A process that is
    stopped watches nothing, so on Linux the kernel is asked to kill it with its parent: the core
    with its owner, a worker with the core.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(owner_pid).wait()
        os._exit(1)

    threading.Thread(target=watch, name="headrace-owner-watch", daemon=True).start()


class HeadraceWorker:
    """Methods that vLLM's workers gain, for collective_rpc."""

    weight_transfer_engine: ShadowWeightTransfer

    def headrace_set_initial_version(self, version: int) -> None:
        self.weight_transfer_engine.set_initial_version(version)

    def headrace_end_update(self) -> int | None:
        """After a failed update: close it where it is still open, and say which version is loaded."""
        with contextlib.suppress(RuntimeError):  # none is open, or the model holds a mixture
            self.finish_weight_update()  # type: ignore[attr-defined] # a method of vLLM's worker
        return self.weight_transfer_engine.loaded_version


WeightTransferEngineFactory.register_engine(BACKEND, ShadowWeightTransfer)
if owner := os.environ.get(OWNER_VARIABLE):
    end_with(int(owner))
