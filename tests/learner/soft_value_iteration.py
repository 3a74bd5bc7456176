"""A token-level problem small enough to solve exactly: rewards for every prefix, an EOS action, a KL weight beta.

The best policy maximises J(policy) = E[Σ_t reward_t] - beta · KL(policy || reference) over whole responses. It is
policy*(a|s) ∝ reference(a|s) exp(Q(s,a) / beta) with V(s) = beta · log Σ_a reference(a|s) exp(Q(s,a) / beta):
Ziebart 2010, "Modeling Purposeful Adaptive Behavior with the Principle of Maximum Causal Entropy", chapter 9;
Levine 2018, "Reinforcement Learning and Control as Probabilistic Inference", section 2.

P prompts, N prefixes of one length, V vocabulary, C = V - 1 tokens that continue, R responses, T tokens of a response.
A table is one [P, N, V] tensor for each number of tokens so far, N = C**t: every state of the problem, and every
action in it. Prefix n continued with token c is prefix n · C + c; the last token of the vocabulary is EOS. After T
tokens a response is over, with EOS or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Table = Sequence[Tensor]


@dataclass(frozen=True)
class TokenProblem:
    """Rewards and the reference's log-probabilities (nats) for every token after every prefix, in float64."""

    rewards: Table
    reference_logprobs: Table
    beta: float


@dataclass(frozen=True)
class Responses:
    """Sampled responses. mask_RT: 1 = sampled token, contiguous from t=0; tokens and prefixes are 0 elsewhere."""

    prompts_R: Tensor
    tokens_RT: Tensor
    prefixes_RT: Tensor
    mask_RT: Tensor


def all_prefixes(length: int, branching: int) -> Tensor:
    """Every prefix of `length` tokens out of `branching`, [N, length]: row n holds the digits of n."""
    return torch.arange(branching**length)[:, None] // branching ** torch.arange(length - 1, -1, -1) % branching


def formula_rewards(
    prompts: Sequence[Sequence[int]], *, num_tokens: int, vocabulary: int, generator: torch.Generator
) -> list[Tensor]:
    """reward(prompt, prefix, a) = 0.35 (liking[prompt, a] + following[last token, a]) - 0.25 · count of a in prefix.

    Every prefix has rewards of its own, yet a small model can learn them in seconds. EOS pays 1 more, so that it
    is often best to stop early, and the first token, whatever it is, 1 more: that changes no optimum, but a response
    whose rewards are counted twice gains from it.
    """
    liking_PV = torch.randn(len(prompts), vocabulary, generator=generator, dtype=torch.float64)
    following_CV = torch.randn(vocabulary - 1, vocabulary, generator=generator, dtype=torch.float64)
    ends_P = torch.tensor([prompt[-1] for prompt in prompts])
    table = []
    for t in range(num_tokens):
        prefixes_Nt = all_prefixes(t, vocabulary - 1)
        counts_NV = functional.one_hot(prefixes_Nt, vocabulary).sum(1)
        last_PN = prefixes_Nt[:, -1].expand(len(prompts), -1) if t else ends_P[:, None]
        rewards_PNV = 0.35 * (liking_PV[:, None] + following_CV[last_PN]) - 0.25 * counts_NV + (t == 0)
        rewards_PNV[..., -1] += 1
        table.append(rewards_PNV)
    return table


def soft_value_iteration(problem: TokenProblem) -> tuple[Tensor, list[Tensor]]:
    """The optimal values of the prompts, [P], and the log-probabilities of the optimal policy."""
    optimal: list[Tensor] = []
    values_PN = _ended(problem.rewards)
    for rewards_PNV, reference_PNV in reversed(list(zip(problem.rewards, problem.reference_logprobs, strict=True))):
        logits_PNV = reference_PNV + (rewards_PNV + _values_after(values_PN, rewards_PNV.shape[1])) / problem.beta
        values_PN = problem.beta * logits_PNV.logsumexp(-1)
        optimal.insert(0, logits_PNV.log_softmax(-1))
    return values_PN[:, 0], optimal


def objective(problem: TokenProblem, logprobs: Table) -> Tensor:
    """J(policy) of each prompt, [P]: expected rewards less beta times the KL to the reference, exactly."""
    tables = zip(problem.rewards, logprobs, problem.reference_logprobs, strict=True)
    return expected_sum([r - problem.beta * (policy - reference) for r, policy, reference in tables], logprobs)


def kl_divergence(logprobs: Table, other_logprobs: Table) -> Tensor:
    """KL(policy || other) over whole responses, for each prompt, [P], in nats."""
    return expected_sum([policy - other for policy, other in zip(logprobs, other_logprobs, strict=True)], logprobs)


def expected_sum(numbers: Table, logprobs: Table) -> Tensor:
    """The expectation, for each prompt, of the sum of `numbers` along a response of the policy, [P]."""
    sums_PN = _ended(numbers)
    for numbers_PNV, logprobs_PNV in reversed(list(zip(numbers, logprobs, strict=True))):
        sums_PN = (logprobs_PNV.exp() * (numbers_PNV + _values_after(sums_PN, numbers_PNV.shape[1]))).sum(-1)
    return sums_PN[:, 0]


def sample(logprobs: Table, *, samples_per_prompt: int, generator: torch.Generator) -> Responses:
    """Responses in the order of their prompts."""
    num_prompts, _, vocabulary = logprobs[0].shape
    prompts_R = torch.arange(num_prompts).repeat_interleave(samples_per_prompt)
    prefix_R = torch.zeros_like(prompts_R)
    running_R = torch.ones_like(prompts_R, dtype=torch.bool)
    columns = []
    for logprobs_PNV in logprobs:
        token_R = logprobs_PNV[prompts_R, prefix_R].exp().multinomial(1, generator=generator).squeeze(1)
        columns.append([token_R * running_R, prefix_R, running_R])
        running_R = running_R & (token_R < vocabulary - 1)
        prefix_R = (prefix_R * (vocabulary - 1) + token_R) * running_R
    return Responses(prompts_R, *(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))


def along(table: Table, responses: Responses) -> Tensor:
    """What the table says of each sampled token, [R, T]; 0 where there is none."""
    columns = zip(table, responses.prefixes_RT.T, responses.tokens_RT.T, strict=True)
    picked_RT = torch.stack([level[responses.prompts_R, prefix_R, token_R] for level, prefix_R, token_R in columns], 1)
    return picked_RT * responses.mask_RT


def _ended(table: Table) -> Tensor:
    """The value of every response of full length, [P, N]: nothing is left to come."""
    num_prompts, num_prefixes, vocabulary = table[-1].shape
    return torch.zeros(num_prompts, num_prefixes * (vocabulary - 1), dtype=table[-1].dtype)


def _values_after(values_PN: Tensor, num_prefixes: int) -> Tensor:
    """From values of the prefixes one token longer to values after each token, [P, N, V]; 0 after EOS."""
    return functional.pad(values_PN.unflatten(1, (num_prefixes, -1)), (0, 1))
