"""What a full set of an engine's weights consists of, and whether tensors are one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpectedWeights:
    """What a full set of weights consists of: shapes by name, and one dtype."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    dtype: torch.dtype

    def checked(self, tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
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


def _as_tensor(value: Tensor | np.ndarray, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().contiguous()
    with warnings.catch_warnings():
        # Arrays in Ray's object store are read-only; we only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.ascontiguousarray(value))
    # NumPy has no bf16.
    is_bf16_view = value.dtype == np.uint16 and dtype == torch.bfloat16
    return tensor.view(torch.bfloat16) if is_bf16_view else tensor
