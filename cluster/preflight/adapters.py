"""Whether the adapters that a run asks for fit its models. Imports transformers, so it is asked only with LoRA."""

from __future__ import annotations

from contracts.algorithm import LoraConfig
from contracts.config import ConfigError


def check_adapters(lora: LoraConfig, path: str, field: str) -> None:
    """Raises ConfigError if the model at `path` (of `field`) has no linear layer of a name that is asked for."""
    from models.adapters import layer_kinds, skeleton

    try:
        layer_kinds(skeleton(path), lora.target_modules)
    except ValueError as error:
        raise ConfigError(f"training.lora.target_modules: {field} {path}: {error}") from error
