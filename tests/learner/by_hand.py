"""A batch, and the papers' formulas for a step on it: one unpadded sequence at a time, floats and plain autograd.

The model here is transformers' own with eager attention, unsharded; nothing of models/ or learner/ computes an
expectation. T response tokens, L tokens of a sequence, V vocabulary, U = T + 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from contracts.algorithm import AlgorithmConfig, TrainingConfig
from contracts.records import ScoredRollout
from learner.ppo import PPOLearner
from learner.ranks import whole
from tests.rollouts import scored_rollout

TEMPERATURE = 0.7
MAX_RESPONSE_TOKENS = 8
EOS = 2
WRAPPED = "_checkpoint_wrapped_module."


class Row(NamedTuple):
    group: str
    prompt: list[int]
    response: list[int]
    reward: float
    finish_reason: str


# Groups of three, two, one and two; the first prompt stands in two groups; a prompt and two responses of one token.
TOY = [
    Row("a", [30, 31, 32], [33, 34, EOS], 1.0, "stop"),
    Row("a", [30, 31, 32], [35, EOS], -0.5, "stop"),
    Row("a", [30, 31, 32], [36, 37, 38, 39], 0.25, "length"),
    Row("b", [40], [41, EOS, 42, 43, EOS], 0.5, "stop"),
    Row("b", [40], [44], 2.0, "length"),
    Row("c", [50, 51], [52], 0.75, "stop"),
    Row("d", [30, 31, 32], [33, 60, 61, 62, 63, 64], -1.0, "length"),
    Row("d", [30, 31, 32], [65, EOS], 1.5, "stop"),
]
NUM_TOKENS = 24
LONGEST = 9  # tokens of the longest sequence: the smallest budget


class PlainActorCritic(nn.Module):
    """Parameters by the learner's names."""

    def __init__(self, folder: Path, *, has_critic: bool, separate: bool) -> None:
        super().__init__()
        self.policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.critic_trunk = None
        if separate:
            self.critic_trunk = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.value_head = nn.ModuleDict({"linear": nn.Linear(self.policy.config.hidden_size, 1)} if has_critic else {})
        self.eval()

    def take(self, tensors: dict[str, Tensor]) -> "PlainActorCritic":
        self.load_state_dict(tensors)
        return self


class Alone(NamedTuple):
    logprobs_T: Tensor
    values_U: Tensor
    entropies_T: Tensor


def alone(plain: PlainActorCritic, prompt: Sequence[int], response: Sequence[int]) -> Alone:
    """One sequence by itself, from plain log_softmax; values are 0 where there is no critic."""
    input_1L = torch.tensor([[*prompt, *response]])
    output = plain.policy(input_ids=input_1L, output_hidden_states=True)
    logprobs_LV = torch.log_softmax(output.logits[0].float() / TEMPERATURE, dim=-1)
    first = len(prompt) - 1
    logprobs_T = torch.stack([logprobs_LV[first + t, token] for t, token in enumerate(response)])
    entropies_T = -(logprobs_LV.exp() * logprobs_LV).sum(-1)[first:-1]
    values_U = torch.zeros(len(response) + 1)
    if "linear" in plain.value_head:
        hidden_1LH = output.hidden_states[-1]
        if plain.critic_trunk is not None:
            hidden_1LH = plain.critic_trunk(input_ids=input_1L).last_hidden_state
        head: Any = plain.value_head["linear"]
        values_U = hidden_1LH[0, first:] @ head.weight[0] + head.bias[0]
    return Alone(logprobs_T, values_U, entropies_T)


@dataclass
class HandTargets:
    """What a step holds fixed: a list of floats for each response; advantages are whitened where there is a critic."""

    advantages: list[list[float]]
    proximal: list[list[float]]
    behavior: list[list[float]]
    old_values: list[list[float]]
    returns: list[list[float]]
    value_mean: float = 0.0
    value_std: float = 1.0

    def normalised(self, value: float) -> float:
        """In the units that the critic predicts."""
        return (value - self.value_mean) / self.value_std


def targets_by_hand(
    plain: PlainActorCritic, batch: Sequence[ScoredRollout], config: AlgorithmConfig, *, kl_coef: float
) -> HandTargets:
    """`plain` has the weights at the start of the step."""
    with torch.no_grad():
        scores = [alone(plain, sample.rollout.prompt_tokens, sample.rollout.response_tokens) for sample in batch]
    targets = HandTargets([], [one.logprobs_T.tolist() for one in scores], [], [], [])
    penalties = [
        [0.0 if config.kl_in_loss else -kl_coef * (now - then) for now, then in _pairs(proximal, sample)]
        for proximal, sample in zip(targets.proximal, batch, strict=True)
    ]
    for proximal, sample in zip(targets.proximal, batch, strict=True):
        behavior = sample.rollout.behavior_logprobs
        if config.behavior_weight_level == "sequence":  # each token's weight is that of the whole response
            behavior = [now - (sum(proximal) - sum(behavior)) for now in proximal]
        targets.behavior.append(list(behavior))
    if not config.has_critic:
        totals = [sample.reward + sum(row) for sample, row in zip(batch, penalties, strict=True)]
        for number, sample in enumerate(batch):
            advantage = group_advantage_by_hand(totals, [one.rollout.group_id for one in batch], number, config.name)
            targets.advantages.append([advantage] * len(sample.rollout.response_tokens))
        return targets
    for one, sample, row in zip(scores, batch, penalties, strict=True):
        *values, last_value = one.values_U.tolist()
        if not (config.truncation == "bootstrap" and sample.rollout.finish_reason == "length"):
            row[-1] += sample.reward  # a score, or the value of the last state; never both
            last_value = 0.0
        advantages, returns = gae_by_hand(row, values, last_value, gamma=config.gamma, lam=config.lam)
        targets.advantages.append(advantages)
        targets.returns.append(returns)
        targets.old_values.append(values)
    targets.advantages = whiten_by_hand(targets.advantages)
    if config.normalise_values:
        flat = [number for row in targets.returns for number in row]
        targets.value_mean, targets.value_std = sum(flat) / len(flat), _std(flat)
    return targets


def loss_by_hand(
    plain: PlainActorCritic,
    batch: Sequence[ScoredRollout],
    targets: HandTargets,
    config: AlgorithmConfig,
    *,
    kl_coef: float,
    rows: Sequence[int] | None = None,
    oldest_version: int = 0,
) -> tuple[Tensor, dict[str, float]]:
    """The objective of one optimizer step on `rows` (all), and the means that metrics show.

    Tokens that weights older than `oldest_version` sampled are not there.

    PPO (Schulman et al. 2017, eq. 7) with weights from proximal to behaviour policy (Hilton et al. 2022), truncated;
    mean over tokens, mean over responses of token means, or of sums over a constant.
    """
    rows = range(len(batch)) if rows is None else rows
    kept_tokens = {
        row: [t for t, version in enumerate(batch[row].rollout.weights_versions) if version >= oldest_version]
        for row in rows
    }
    num_tokens = sum(map(len, kept_tokens.values()))
    num_responses = sum(map(bool, kept_tokens.values()))
    parts: dict[str, Any] = {"policy_loss": 0.0, "value_loss": 0.0, "kl_loss": 0.0, "entropy": 0.0}
    seen: dict[str, list[float]] = {"ratio": [], "weight": [], "clipped": []}
    for row in rows:
        rollout = batch[row].rollout
        now = alone(plain, rollout.prompt_tokens, rollout.response_tokens)
        share = {
            "token": 1 / num_tokens,
            "sequence": 1 / (num_responses * max(1, len(kept_tokens[row]))),
            "constant": 1 / (num_responses * MAX_RESPONSE_TOKENS),
        }[config.aggregation]
        for t in kept_tokens[row]:
            proximal, advantage = targets.proximal[row][t], targets.advantages[row][t]
            ratio = (now.logprobs_T[t] - proximal).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            weight = min(math.exp(proximal - targets.behavior[row][t]), config.behavior_weight_cap)
            least = torch.minimum(ratio * advantage, clipped * advantage)
            parts["policy_loss"] = parts["policy_loss"] - share * weight * least
            log_ratio = batch[row].reference_logprobs[t] - now.logprobs_T[t]
            k3 = log_ratio.exp() - 1 - log_ratio
            parts["kl_loss"] = parts["kl_loss"] + share * (k3 if config.kl_estimator == "k3" else 0.5 * log_ratio**2)
            parts["entropy"] = parts["entropy"] + share * now.entropies_T[t]
            if config.has_critic:
                goal, old = targets.normalised(targets.returns[row][t]), targets.normalised(targets.old_values[row][t])
                value = now.values_U[t]
                kept = old + (value - old).clamp(-config.value_clip, config.value_clip)
                worse = torch.maximum((value - goal) ** 2, (kept - goal) ** 2)
                parts["value_loss"] = parts["value_loss"] + worse / 2 / num_tokens
            seen["ratio"].append(ratio.item())
            seen["weight"].append(weight)
            seen["clipped"].append(float(clipped.item() * advantage < ratio.item() * advantage))
    loss = parts["policy_loss"] + config.value_coef * parts["value_loss"] - config.entropy_coef * parts["entropy"]
    if config.kl_in_loss:
        loss = loss + kl_coef * parts["kl_loss"]
    means = {name: float(torch.as_tensor(number).detach()) for name, number in parts.items()}
    return loss, means | {
        "ratio_max": max(seen["ratio"]),
        "weight_max": max(seen["weight"]),
        "weight_min": min(seen["weight"]),
        "clip_fraction": sum(seen["clipped"]) / num_tokens,
    }


def gae_by_hand(
    rewards: Sequence[float], values: Sequence[float], last_value: float, *, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Schulman et al. 2016, eq. 16, as the double sum: advantages and returns."""
    after = [*values[1:], last_value]
    deltas = [
        reward + gamma * following - value for reward, following, value in zip(rewards, after, values, strict=True)
    ]
    advantages = [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas))) for t in range(len(deltas))
    ]
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def group_advantage_by_hand(totals: Sequence[float], groups: Sequence[str], number: int, name: str) -> float:
    """Shao et al. 2024 (grpo), Liu et al. 2025 (dr_grpo), Ahmadian et al. 2024 (rloo), Hu 2025 (reinforce++)."""
    others = [total for other, total in enumerate(totals) if groups[other] == groups[number] and other != number]
    everyone = [*others, totals[number]]
    if name == "reinforce++":
        everyone = list(totals)
    elif not others:
        return 0.0
    mean = sum(everyone) / len(everyone)
    if name == "rloo":
        return totals[number] - sum(others) / len(others)
    if name == "dr_grpo":
        return totals[number] - mean
    std = math.sqrt(sum((total - mean) ** 2 for total in everyone) / (len(everyone) - 1))
    return (totals[number] - mean) / (std + 1e-6)


def whiten_by_hand(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    flat = [number for row in rows for number in row]
    mean = sum(flat) / len(flat)
    return [[(number - mean) / _std(flat) for number in row] for row in rows]


def _std(numbers: Sequence[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))


def _pairs(proximal: Sequence[float], sample: ScoredRollout) -> list[tuple[float, float]]:
    return list(zip(proximal, sample.reference_logprobs, strict=True))


# --- the learner beside it -------------------------------------------------------------------------------------------


def new_learner(
    folder: Path,
    algorithm: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    value_head: bool = True,
    mask_older_than: int | None = None,
    **training: Any,
) -> PPOLearner:
    """fp32, one update a step, no clipping of the norm; the value head gets weights of its own: it starts at zero."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "epochs": 1,
        "minibatches": 1,
        "batch_size": len(TOY),
        "learning_rate": 1e-3,
        "max_grad_norm": 1e9,
    }
    learner = PPOLearner(
        str(folder),
        AlgorithmConfig(**algorithm or {}),
        TrainingConfig(**defaults | training),
        temperature=TEMPERATURE,
        max_response_tokens=MAX_RESPONSE_TOKENS,
        total_steps=10,
        seed=seed,
        mask_older_than=mask_older_than,
    )
    if value_head and learner.policy.value_head is not None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in learner.policy.value_head.parameters():
                local: Any = parameter
                local.to_local().copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return learner


def plain_copy(folder: Path, learner: PPOLearner) -> PlainActorCritic:
    """The learner's weights as they are now."""
    separate = learner.policy.critic_trunk is not None
    plain = PlainActorCritic(folder, has_critic=learner.algorithm.has_critic, separate=separate)
    return plain.take(tensors_of(learner))


def tensors_of(learner: PPOLearner) -> dict[str, Tensor]:
    return {
        name.replace(WRAPPED, ""): whole(tensor).detach().clone()
        for name, tensor in learner.policy.state_dict().items()
    }


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    """All of them; a parameter without one is an error."""
    gradients = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        gradients[name.replace(WRAPPED, "")] = whole(parameter.grad).detach().clone()
    return gradients


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 2e-5) -> None:
    """Within `tolerance` of each tensor's largest gradient."""
    assert found.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.01
    for name, gradient in found.items():
        atol = tolerance * float(expected[name].abs().max()) + 1e-9
        off = float((gradient - expected[name]).abs().max())
        assert off <= atol, f"{name}: off by {off}, allowed is {atol}"


def record_updates(
    learner: PPOLearner, *, sgd_rate: float | None = None
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(parameters before, gradients) of each optimizer step to come.

    With `sgd_rate` the updates are plain SGD: Adam would turn the least gradient into a full step of either sign.
    """
    updates: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    if sgd_rate is not None:
        groups = [{"params": group["params"], "base_lr": sgd_rate} for group in learner.optimizer.param_groups]
        learner.optimizer = torch.optim.SGD(groups, lr=sgd_rate)  # type: ignore[assignment]
    optimizer_step: Callable[[], Any] = learner.optimizer.step

    def step() -> None:
        updates.append((tensors_of(learner), gradients_of(learner.policy)))
        optimizer_step()

    learner.optimizer.step = step  # type: ignore[method-assign, assignment]
    return updates


def toy_batch(plain: PlainActorCritic, *, version: int = 0, seed: int = 0, noise: float = 0.6) -> list[ScoredRollout]:
    """TOY with behavior and reference log-probabilities somewhat off those of the policy."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for number, row in enumerate(TOY):
        with torch.no_grad():
            logprobs_T = alone(plain, row.prompt, row.response).logprobs_T
        off_2T = noise * torch.randn(2, len(row.response), generator=generator)
        batch.append(
            scored_rollout(
                f"t{number}",
                group_id=row.group,
                prompt=row.prompt,
                response=row.response,
                behavior=(logprobs_T + off_2T[0]).tolist(),
                reference=(logprobs_T + off_2T[1]).tolist(),
                versions=[version] * len(row.response),
                reward=row.reward,
                finish_reason=row.finish_reason,
            )
        )
    return batch
