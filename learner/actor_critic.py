"""Policy and critic as one module: a single forward pass gives log-probabilities, values and the policy's loss.

N response tokens of a micro-batch, end to end; M = N plus one row behind each response; H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from models.forward import check_supported, predicting_rows
from models.heads import ValueHead
from models.packing import Layout, allow_packing
from models.projection import ChunkLoss, EntropyMode, Stats, score_tokens, token_loss


class Scores(NamedTuple):
    """What the current weights say of sampled tokens; `values_M` is empty where there is no critic."""

    logprobs_N: Tensor
    entropy_N: Tensor
    values_M: Tensor


class Losses(NamedTuple):
    """The policy's loss of a micro-batch, what the critic predicts there, and the loss's statistics."""

    policy: Tensor
    values_M: Tensor
    stats: Stats


class ActorCritic(nn.Module):
    """A causal language model; a value head on its trunk or on a trunk of its own; or no critic at all."""

    def __init__(self, policy: Any, *, critic_trunk: Any | None = None, has_critic: bool = True) -> None:
        super().__init__()
        check_supported(policy)
        self.policy = policy
        self.critic_trunk = critic_trunk
        trunk = critic_trunk if critic_trunk is not None else policy
        self.value_head = ValueHead(trunk.config.hidden_size) if has_critic else None

    @classmethod
    def load(
        cls, path: str, *, has_critic: bool = True, critic_path: str | None = None, packing: str = "shared_prompts"
    ) -> ActorCritic:
        """fp32 masters, dropout off: the first ratio of an update must be 1.

        `critic_path` gives the critic a trunk of its own, started from that model.
        """
        policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        trunk: Any = AutoModel.from_pretrained(critic_path, dtype=torch.float32) if critic_path else None
        for model in (policy, trunk):
            if model is not None and packing != "padded":
                allow_packing(model)
        return cls(policy, critic_trunk=trunk, has_critic=has_critic).eval()

    def forward(
        self,
        batch: Layout,
        tokens_N: Tensor,
        *,
        temperature: float,
        loss: ChunkLoss | None = None,
        entropy: EntropyMode = "metric",
    ) -> Scores | Losses:
        """`Scores` without a loss, else `Losses`. One call, so that a sharded module is gathered once."""
        device = tokens_N.device
        hidden_MH = batch.hidden(self.policy.get_decoder(), device)
        hidden_NH = hidden_MH[predicting_rows(batch.lengths, device)]
        output = self.policy.get_output_embeddings()
        values_M = self._values(batch, hidden_MH)
        if loss is None:
            logprobs_N, entropy_N = score_tokens(
                hidden_NH, output.weight, output.bias, tokens_N, temperature=temperature
            )
            return Scores(logprobs_N, entropy_N, values_M)
        policy, stats = token_loss(
            hidden_NH, output.weight, output.bias, tokens_N, loss, temperature=temperature, entropy=entropy
        )
        return Losses(policy, values_M, stats)

    def _values(self, batch: Layout, hidden_MH: Tensor) -> Tensor:
        if self.value_head is None:
            return hidden_MH.new_zeros(0, dtype=torch.float32)
        if self.critic_trunk is not None:
            hidden_MH = batch.hidden(self.critic_trunk, hidden_MH.device)
        values_M: Tensor = self.value_head(hidden_MH)
        return values_M

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The blocks that sharding gathers, and checkpointing recomputes, one at a time."""
        kinds = set(self.policy._no_split_modules)
        if self.critic_trunk is not None:
            kinds |= set(self.critic_trunk._no_split_modules)
        return ((name, part) for name, part in self.named_modules() if type(part).__name__ in kinds)

    def tied(self) -> set[str]:
        """Names of the policy's tensors that are another's under a second name."""
        return set(self.policy.all_tied_weights_keys or {})
