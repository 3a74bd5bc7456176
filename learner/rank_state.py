"""The learner's state on disk: sharded tensors (torch.distributed.checkpoint) and a JSON file of all else.

Every rank writes its shards, and any number of ranks can load them: state/learner/ holds what is trained (with LoRA
only adapters and value head) and its optimizer moments, state/learner.json the counters, the KL coefficient and the
running statistics.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from contracts.disk import DiskFull, is_full
from learner.plain_state import PlainPlanner, PlainReader
from learner.ppo import PPOLearner
from models.adapters import layer_kinds, save_adapter, skeleton

# Layers that LoRA freezes are those of the base model: they are in no state.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_state(learner: PPOLearner, folder: Path) -> None:
    """Write `learner/` and `learner.json` below `folder`; a collective.

    Raises:
        Exception: on all ranks, what the first of those had that could not write; DiskFull for want of room.
    """
    try:
        with _quiet():
            dcp.save(_state(learner), storage_writer=_Writer(folder / "learner"))
    except CheckpointException as together:  # not an Exception, and Ray would end the process for it
        raise next(error for error, _ in together.failures.values()) from together
    if learner.ranks.rank == 0:
        (folder / "learner.json").write_text(json.dumps(learner.counters(), indent=1), encoding="utf-8")


def load_state(learner: PPOLearner, folder: Path) -> None:
    """Take over what `save_state` wrote, on this many ranks or another number; a collective.

    Raises:
        ValueError: it is of another model or algorithm, or holds more than tensors and plain values.
    """
    learner.restore_counters(json.loads((folder / "learner.json").read_text(encoding="utf-8")))
    state = _state(learner)
    with _quiet():
        _check_same(state, folder / "learner")
        dcp.load(state, storage_reader=PlainReader(folder / "learner"), planner=PlainPlanner())
    set_state_dict(
        learner.policy,
        learner.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_TRAINED,
    )


def save_policy(learner: PPOLearner, folder: Path, tokenizer: Any) -> None:
    """Write the policy as a Hugging Face folder in bf16; a collective, rank 0 writes."""
    weights = learner.weights()
    if learner.ranks.rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}, folder
    )
    model = learner.policy.policy
    # The model's own config names the dtype of the masters, and its attention is the learner's business.
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config._attn_implementation = None
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_policy_adapter(learner: PPOLearner, folder: Path, *, base: str) -> None:
    """Write the policy's adapter, fp32, as a PEFT folder over the model `base`; a collective, rank 0 writes.

    Does nothing without LoRA.
    """
    lora = learner.training.lora
    if lora is None:
        return
    tensors = learner.adapter_weights()
    if learner.ranks.rank == 0:
        save_adapter(folder, tensors, lora, layer_kinds(skeleton(base), lora.target_modules), base=base)


def _state(learner: PPOLearner) -> dict[str, Any]:
    """The sharded tensors of a checkpoint, without frozen ones."""
    model, optimizer = get_state_dict(learner.policy, learner.optimizer, options=_TRAINED)
    # torch leaves out a frozen tensor under the first of its names; a tied one has two.
    frozen = {name for name, p in learner.policy.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {"model": {name: t for name, t in model.items() if name not in frozen}, "optimizer": optimizer}


def _check_same(state: dict[str, Any], folder: Path) -> None:
    """Raise ValueError naming a tensor that is missing on either side or of another shape."""
    saved = PlainReader(folder).read_metadata().state_dict_metadata
    for name, tensor in state["model"].items():
        found = saved.get(f"model.{name}")
        size = getattr(found, "size", None)
        if size is None or tuple(size) != tuple(tensor.shape):
            what = "missing" if size is None else f"of shape {tuple(size)}"
            raise ValueError(
                f"{folder}: checkpoint of another model: {name} has shape {tuple(tensor.shape)} here, there it "
                f"is {what}"
            )
    extra = sorted(name for name in saved if name.startswith("model.") and name[6:] not in state["model"])
    if extra:
        raise ValueError(f"{folder}: checkpoint of another model or algorithm: {extra[0][6:]} is not there here")


class _Writer(dcp.FileSystemWriter):
    """Says that a disk is full in words that reach the other ranks: an error's cause does not."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch's archive writer has lost count of what the disk took
            if is_full(error):
                raise DiskFull("no space left on the disk") from error
            raise


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's own notes about its formats are not for the person who trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
