"""The learner as a Ray actor: consumes scored batches, gives back metrics and weights.

It waits for nothing but its caller; every call runs to its end in the order of arrival. The caller sets the
deadline (`deadlines.learn_s`, `deadlines.checkpoint_s`) and names this actor in the error.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import ray
import torch
from transformers import AutoTokenizer

from contracts.config import PPOConfig
from contracts.records import ScoredRollout, WeightsUpdate
from learner.ppo import PPOLearner
from learner.publish import WeightsRef, publish


@ray.remote
class Learner:
    """Policy, critic and optimizer in one process."""

    def __init__(
        self,
        model_path: str,
        config: PPOConfig,
        *,
        temperature: float,
        seed: int,
        threads: int | None,
        state_path: str | None = None,
    ) -> None:
        torch.set_num_threads(threads or os.cpu_count() or 1)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._learner = PPOLearner(model_path, config, temperature=temperature, seed=seed, device=device)
        if state_path is not None:
            self._learner.restore(torch.load(state_path, map_location=device, weights_only=True))

    def ready(self) -> int:
        """Trainable parameters; returns once the model is loaded."""
        return sum(parameter.numel() for parameter in self._learner.policy.parameters())

    def step(self, batch: Sequence[ScoredRollout], *, training_version: int) -> dict[str, float]:
        return self._learner.step(batch, training_version=training_version)

    def publish(self, version: int) -> tuple[WeightsUpdate, WeightsRef]:
        return publish(self._learner.weights(), version=version)

    def save(self, folder: str) -> None:
        """Write `policy/` (a Hugging Face folder in bf16) and `state/learner.pt` below `folder`."""
        policy, state = Path(folder, "policy"), Path(folder, "state")
        state.mkdir(parents=True, exist_ok=True)
        model = self._learner.policy.model
        tensors = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
        model.save_pretrained(policy, state_dict=tensors)
        # save_pretrained names the dtype of the masters, not of the tensors that it has written.
        config = copy.deepcopy(model.config)
        config.dtype = torch.bfloat16
        config.save_pretrained(policy)
        self._tokenizer.save_pretrained(policy)
        torch.save(self._learner.state(), state / "learner.pt")
