"""A worker that fails when it is told to; vLLM imports it in the engine core as `models.engine_start.WORKER`."""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from models.vllm_weights import HeadraceWorker


class FailingWorker(HeadraceWorker):
    """`collective_rpc` calls that spoil the next load of weights, and only that one."""

    def fail_next_load(self, num_tensors: int) -> None:
        """It raises after `num_tensors` tensors."""

        def load_some(load: Callable[..., Any], weights: Iterable[Any]) -> None:
            load(islice(weights, num_tensors))
            raise RuntimeError("told to fail")

        self._spoil(load_some)

    def slow_next_load(self, seconds: float) -> None:
        """It takes `seconds` longer."""

        def load_late(load: Callable[..., Any], weights: Iterable[Any]) -> Any:
            time.sleep(seconds)
            return load(weights)

        self._spoil(load_late)

    def _spoil(self, spoiled: Callable[..., Any]) -> None:
        model: Any = self.weight_transfer_engine.model
        original = model.load_weights

        def load_once(weights: Iterable[Any]) -> Any:
            del model.load_weights  # the instance's: the class has its own
            return spoiled(original, weights)

        model.load_weights = load_once
