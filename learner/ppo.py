"""One PPO step on one process: proximal pass, advantages, clipped epochs. Torch only, no Ray.

B responses, T response tokens, U = T + 1, L tokens of a sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from contracts.config import PPOConfig
from contracts.records import ScoredRollout
from contracts.seeds import derive_seed
from learner.advantage import gae, shape_rewards, whiten
from learner.experience import Experience, MicroBatch, micro_batches, to_experience
from learner.loss import kl, policy_loss, value_loss
from models.forward import ResponseBatch, check_supported, response_hidden, response_logits
from models.heads import ValueHead
from models.logprobs import entropy, token_logprobs


class Prediction(NamedTuple):
    """Log-probabilities of the sampled tokens, values of the states before each and behind the last, entropies."""

    logprobs_BT: Tensor
    values_BU: Tensor
    entropy_BT: Tensor | None


class ActorCritic(nn.Module):
    """A causal language model and a value head on the same trunk."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        check_supported(model)
        self.model = model
        self.value_head = ValueHead(model.config.hidden_size)

    @classmethod
    def load(cls, path: str) -> ActorCritic:
        """fp32 masters, dropout off: the first ratio of an update must be 1."""
        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)).eval()

    def forward(self, batch: ResponseBatch, *, temperature: float, with_entropy: bool) -> Prediction:
        hidden_BUH = response_hidden(self.model, batch)
        logits_BTV = response_logits(self.model, hidden_BUH)
        logprobs_BT = token_logprobs(logits_BTV, batch.tokens_BT, temperature=temperature)
        with torch.no_grad():
            entropy_BT = entropy(logits_BTV, temperature=temperature) if with_entropy else None
        return Prediction(logprobs_BT, self.value_head(hidden_BUH), entropy_BT)


@dataclass(frozen=True)
class Targets:
    """What the epochs hold fixed, all [B, T], computed under the weights at the start of the step."""

    proximal_logprobs_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


class PPOLearner:
    """Policy, value head, optimizer and KL controller of one process."""

    def __init__(
        self, model_path: str, config: PPOConfig, *, temperature: float, seed: int, device: str = "cpu"
    ) -> None:
        self.config = config
        self.temperature = temperature
        self.seed = seed
        self.device = torch.device(device)
        self.policy = ActorCritic.load(model_path).to(self.device)
        self.kl_coef = config.kl_coef
        self.step_count = 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.policy.model.parameters()), "base_lr": config.learning_rate},
                {"params": list(self.policy.value_head.parameters()), "base_lr": config.value_learning_rate},
            ],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, batch: Sequence[ScoredRollout], *, training_version: int) -> dict[str, float]:
        """Train on one batch.

        Returns:
            metrics, always finite.

        Raises:
            ValueError: a record that cannot be trained on; names the trajectory.
            ArithmeticError: no minibatch had a finite gradient.
        """
        experience = to_experience(batch)
        targets, metrics = self._targets(experience)
        stats: Counter[str] = Counter()
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "minibatches", training_version))
        for _ in range(self.config.epochs):
            order = torch.randperm(len(experience), generator=generator)
            for rows in order.tensor_split(self.config.minibatches):
                if len(rows):
                    _add_stats(stats, self._minibatch(experience, targets, rows.tolist()))
        if stats["skipped_minibatches"] == stats["minibatches"]:
            raise ArithmeticError(f"step {training_version + 1}: no minibatch had a finite loss and gradient norm")
        self._adapt_kl(metrics["kl_to_reference"], len(experience))
        self.step_count += 1
        return metrics | _update_metrics(stats) | _lag_metrics(batch, training_version) | {"kl_coef": self.kl_coef}

    def _targets(self, experience: Experience) -> tuple[Targets, dict[str, float]]:
        """The proximal pass: log-probabilities, values, shaped rewards, GAE, whitening over the whole batch."""
        mask_BT = experience.mask_BT
        logprobs_BT, values_BT, entropy_BT = (torch.zeros(mask_BT.shape) for _ in range(3))
        last_values_B = torch.zeros(len(experience))
        with torch.no_grad():
            for micro in self._micro_batches(experience, range(len(experience))):
                predicted = self._predict(micro.responses, with_entropy=True)
                width = predicted.logprobs_BT.shape[1]
                logprobs_BT[micro.rows, :width] = predicted.logprobs_BT.cpu()
                values_BT[micro.rows, :width] = predicted.values_BU[:, :-1].cpu()
                assert predicted.entropy_BT is not None
                entropy_BT[micro.rows, :width] = predicted.entropy_BT.cpu()
                last_values_B[micro.rows] = predicted.values_BU[:, -1].cpu()  # padding repeats the last state
        config = self.config
        bootstrapped_B = experience.truncated_B & (config.truncation == "bootstrap")
        # Never a score and a bootstrap value for one response: that counts its future twice.
        scores_B = experience.scores_B.masked_fill(bootstrapped_B, 0.0)
        kl_BT = kl(logprobs_BT, experience.reference_logprobs_BT, estimator="k1")
        rewards_BT = shape_rewards(scores_B, kl_BT, mask_BT, kl_coef=self.kl_coef)
        advantages_BT, returns_BT = gae(
            rewards_BT,
            values_BT,
            mask_BT,
            gamma=config.gamma,
            lam=config.lam,
            bootstrap_B=last_values_B * bootstrapped_B,
        )
        targets = Targets(logprobs_BT, values_BT, whiten(advantages_BT, mask_BT), returns_BT)
        return targets, _batch_metrics(experience, targets, kl_BT, entropy_BT)

    def _minibatch(self, experience: Experience, targets: Targets, rows: list[int]) -> dict[str, float]:
        """One optimizer step. Losses of the micro-batches add up to that of the minibatch (global token count)."""
        config = self.config
        num_tokens = int(experience.mask_BT[rows].sum())
        stats: Counter[str] = Counter()
        self.optimizer.zero_grad(set_to_none=True)
        for micro in self._micro_batches(experience, rows):
            predicted = self._predict(micro.responses, with_entropy=False)

            rows_of = partial(_rows, micro=micro, like_BT=predicted.logprobs_BT)
            mask_BT = rows_of(experience.mask_BT)
            policy, policy_stats = policy_loss(
                predicted.logprobs_BT,
                rows_of(targets.proximal_logprobs_BT),
                rows_of(experience.behavior_logprobs_BT),
                rows_of(targets.advantages_BT),
                mask_BT,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                behavior_weight_cap=config.behavior_weight_cap,
                num_tokens=num_tokens,
            )
            value, value_stats = value_loss(
                predicted.values_BU[:, :-1],
                rows_of(targets.values_BT),
                rows_of(targets.returns_BT),
                mask_BT,
                clip=config.value_clip,
                num_tokens=num_tokens,
            )
            (policy + config.value_coef * value).backward()
            _add_stats(stats, {name: float(number) for name, number in (policy_stats | value_stats).items()})
            _add_stats(stats, {"policy_loss": float(policy.detach()), "value_loss": float(value.detach())})
        self._set_learning_rates()
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm))
        finite = norm < float("inf")  # False for NaN too
        if finite:
            self.optimizer.step()
        extra = {"grad_norm_sum": norm if finite else 0.0, "minibatches": 1.0, "skipped_minibatches": float(not finite)}
        return dict(stats) | extra if finite else extra

    def _predict(self, responses: ResponseBatch, *, with_entropy: bool) -> Prediction:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            predicted: Prediction = self.policy(
                responses.to(self.device), temperature=self.temperature, with_entropy=with_entropy
            )
        return predicted

    def _micro_batches(self, experience: Experience, rows: Sequence[int]) -> list[MicroBatch]:
        pad_token = self.policy.model.config.pad_token_id or 0
        return micro_batches(experience, rows, token_budget=self.config.micro_batch_tokens, pad_token=pad_token)

    def _set_learning_rates(self) -> None:
        warmup = min(1.0, (self.step_count + 1) / (self.config.warmup_steps + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * warmup

    def _adapt_kl(self, kl_per_response: float, num_responses: int) -> None:
        """Proportional controller in log space (Ziegler et al. 2019, section 2.2)."""
        if self.config.kl_target is not None:
            error = min(max(kl_per_response / self.config.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * num_responses / self.config.kl_horizon

    def weights(self) -> dict[str, Tensor]:
        """The policy's tensors by checkpoint name; a tied output projection is left out."""
        tied = set(getattr(self.policy.model, "all_tied_weights_keys", {}) or {})
        return {name: tensor for name, tensor in self.policy.model.state_dict().items() if name not in tied}

    def state(self) -> dict[str, Any]:
        return {
            "policy": self.weights(),
            "value_head": self.policy.value_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kl_coef": self.kl_coef,
            "step_count": self.step_count,
        }

    def restore(self, state: dict[str, Any]) -> None:
        missing, unexpected = self.policy.model.load_state_dict(state["policy"], strict=False)
        lost = set(missing) - set(getattr(self.policy.model, "all_tied_weights_keys", {}) or {})
        if lost or unexpected:
            raise ValueError(f"checkpoint of another model: missing {sorted(lost)[:3]}, unexpected {unexpected[:3]}")
        self.policy.value_head.load_state_dict(state["value_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_coef = state["kl_coef"]
        self.step_count = state["step_count"]


def _rows(batch_BT: Tensor, *, micro: MicroBatch, like_BT: Tensor) -> Tensor:
    """The rows of a micro-batch, as wide and where its predictions are."""
    return batch_BT[micro.rows, : like_BT.shape[1]].to(like_BT.device)


def _add_stats(total: Counter[str], more: dict[str, float]) -> None:
    """Keys that end in _max combine by maximum, all others by sum."""
    for name, number in more.items():
        total[name] = max(total[name], number) if name.endswith("_max") else total[name] + number  # type: ignore[assignment]


def _batch_metrics(experience: Experience, targets: Targets, kl_BT: Tensor, entropy_BT: Tensor) -> dict[str, float]:
    mask_BT = experience.mask_BT
    valid = mask_BT.sum()
    returns = targets.returns_BT[mask_BT].double()  # the square of a large score overflows float32
    errors = returns - targets.values_BT[mask_BT]
    variance = returns.var(correction=0)
    gap = (targets.proximal_logprobs_BT - experience.behavior_logprobs_BT)[mask_BT].abs()
    return {
        "kl_to_reference": float((kl_BT * mask_BT).sum() / len(experience)),
        "entropy": float((entropy_BT * mask_BT).sum() / valid),
        "explained_variance": float(1 - errors.var(correction=0) / variance) if variance > 0 else 0.0,
        "response_tokens_mean": float(valid / len(experience)),
        "truncated_fraction": float(experience.truncated_B.float().mean()),
        "behavior_logprob_gap_mean": float(gap.mean()),
        "behavior_logprob_gap_max": float(gap.max()),
    }


def _update_metrics(stats: Counter[str]) -> dict[str, float]:
    tokens = max(stats["tokens"], 1)
    updates = max(stats["minibatches"] - stats["skipped_minibatches"], 1)
    return {
        "policy_loss": stats["policy_loss"] / updates,
        "value_loss": stats["value_loss"] / updates,
        "clip_fraction": stats["clipped_tokens"] / tokens,
        "approx_kl": stats["approx_kl_sum"] / tokens,
        "ratio_max": float(stats["ratio_max"]),
        "truncated_weight_fraction": stats["truncated_weights"] / tokens,
        "grad_norm": stats["grad_norm_sum"] / updates,
        "skipped_minibatches": float(stats["skipped_minibatches"]),
    }


def _lag_metrics(batch: Sequence[ScoredRollout], training_version: int) -> dict[str, float]:
    lags = [training_version - sample.rollout.oldest_version for sample in batch]
    return {"lag_steps_max": float(max(lags)), "lag_steps_mean": sum(lags) / len(lags)}
