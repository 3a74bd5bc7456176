"""A training of a reward model that was interrupted: everything that decides how it goes on, in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


def save_state(
    file: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    *,
    step: int,
    identity: dict[str, Any],
) -> None:
    """After `step` optimizer steps. The file is replaced whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"step": str(step), "identity": json.dumps(identity)})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def load_state(
    file: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, *, identity: dict[str, Any]
) -> int:
    """Put parameters and moments back, and return how many steps were done.

    Raises:
        ValueError: the file is damaged, or another training's; names what differs.
    """
    try:
        with safe_open(file, framework="pt") as saved:
            metadata = saved.metadata()
            different = _differences(json.loads(metadata["identity"]), identity)
            if different:
                raise ValueError(
                    f"{file} is of another training ({'; '.join(different)}); set it back, or start without resume"
                )
            for name, parameter in parameters.items():
                parameter.copy_(saved.get_tensor(f"parameter/{name}"))
                optimizer.state[parameter] = {
                    moment: saved.get_tensor(f"{moment}/{name}").to(parameter.device if moment != "step" else "cpu")
                    for moment in _MOMENTS
                }
            return int(metadata["step"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is damaged ({' '.join(str(error).split())}); remove it to start over") from error


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    now = json.loads(json.dumps(now))  # tuples are lists in the file
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
