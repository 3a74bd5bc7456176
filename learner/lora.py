"""LoRA in the learner: adapters beside frozen layers, through PEFT; they and the value head alone are trained.

Masters of the adapters are fp32. The frozen layers are kept in the dtype they compute in, half the memory of masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from peft import inject_adapter_in_model
from torch import Tensor

from contracts.algorithm import LoraConfig
from contracts.seeds import derive_seed
from learner.actor_critic import ActorCritic
from models.adapters import PREFIX, layer_kinds, peft_config

_BASE = ".base_layer"
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(module: ActorCritic, lora: LoraConfig, *, dtype: torch.dtype, seed: int) -> None:
    """Freeze policy and critic trunk and give each adapters of its own, the same on every rank.

    Raises:
        ValueError: `target_modules` names a layer that a model does not have.
    """
    for label, model in (("policy", module.policy), ("critic", module.critic_trunk)):
        if model is None:
            continue
        config = peft_config(lora, layer_kinds(model, lora.target_modules))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapters", label))
            inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            trained = name.endswith((_A, _B))
            parameter.requires_grad_(trained)
            if trained:
                parameter.data = parameter.data.float()
    module.eval()


def adapter_names(names: Iterable[str]) -> set[str]:
    """Those names of a state dict that are an adapter's."""
    return {name for name in names if name.endswith((_A, _B))}


def adapters(state: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The adapters of a state dict by PEFT's names."""
    names = adapter_names(state)
    return {
        PREFIX + name.replace(".default.weight", ".weight"): whole(tensor)
        for name, tensor in state.items()
        if name in names
    }


def merged(state: Mapping[str, Tensor], lora: LoraConfig, whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A state dict with adapters as that of the plain model: fp32 W + alpha / rank · B A where there is one."""
    tensors = {}
    left_out = adapter_names(state)
    for name, tensor in state.items():  # in this order on every rank: `whole` is a collective
        if name in left_out:
            continue
        value = whole(tensor)
        layer = name.removesuffix(".weight").removesuffix(_BASE)
        if layer + _A in state and name.endswith(f"{_BASE}.weight"):
            change = whole(state[layer + _B]) @ whole(state[layer + _A])
            value = value.float() + lora.alpha / lora.rank * change
        tensors[name.replace(f"{_BASE}.", ".")] = value
    return tensors
