"""LoRA adapters (Hu et al. 2021): which layers get one, and the PEFT folder that learner, engines, checkpoints share.

A layer's output becomes W x + alpha / rank · B A x; A is [rank, inputs], B is [outputs, rank] and starts at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contracts.algorithm import LoraConfig

# PEFT stores the adapter of layer NAME as PREFIX NAME.lora_A.weight and .lora_B.weight.
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def layer_kinds(model: Any, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Last names of the linear layers that get an adapter, sorted; `wanted` None: all but the output projection.

    Raises:
        ValueError: a wanted name that no such layer has; lists those there are.
    """
    there = sorted({name.rpartition(".")[2] for name, _ in _linear_layers(model)})
    unknown = [name for name in wanted or () if name not in there]
    if unknown or not there:
        what = f"no linear layer is named {unknown[0]!r}" if unknown else "no linear layer that could be adapted"
        raise ValueError(f"{what}; there are: {', '.join(there) or 'none'} (the output projection is never adapted)")
    return tuple(there if wanted is None else sorted(set(wanted)))


def skeleton(path: str) -> Any:
    """The causal language model at `path` without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


def adapter_shapes(model: Any, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole adapter by PEFT's names."""
    kinds = layer_kinds(model, lora.target_modules)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in _linear_layers(model):
        if name.rpartition(".")[2] in kinds:
            shapes[f"{PREFIX}{name}.lora_A.weight"] = (lora.rank, layer.in_features)
            shapes[f"{PREFIX}{name}.lora_B.weight"] = (layer.out_features, lora.rank)
    return shapes


def peft_config(lora: LoraConfig, kinds: Sequence[str], *, base: str | None = None, classifier: bool = False) -> Any:
    """PEFT's own configuration of the same adapter; that of a `classifier` holds its score head too."""
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(kinds),
        lora_dropout=0.0,  # with dropout the first ratio of an update would not be 1
        bias="none",
        base_model_name_or_path=base,
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        modules_to_save=["score"] if classifier else None,
    )


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    lora: LoraConfig,
    kinds: Sequence[str],
    *,
    base: str,
    classifier: bool = False,
) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads, and vLLM where it is not a `classifier`'s."""
    folder.mkdir(parents=True, exist_ok=True)
    config = peft_config(lora, kinds, base=base, classifier=classifier)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(
        {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )


def load_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder."""
    return load_file(folder / WEIGHTS)


def _linear_layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    output = model.get_output_embeddings()  # None for a bare trunk
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            yield name, module
