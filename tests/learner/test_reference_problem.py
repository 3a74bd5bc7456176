"""The learner on a problem whose optimum is known: each algorithm comes close to it, and the usual mistakes do not.

Four prompts, five tokens of which one is EOS, at most four tokens a response. A tiny Llama starts as the reference and
is trained on responses it samples itself. What counts is the share of J(optimum) - J(reference) that is still missing
after STEPS steps, exact at every point, because the policy is written out as a table.

R responses, T tokens of a response. Tables: tests/learner/soft_value_iteration.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from contracts.algorithm import AlgorithmConfig, TrainingConfig
from contracts.records import ScoredRollout
from learner import ppo
from learner.experience import Experience
from learner.ppo import PPOLearner
from learner.targets import Predictions, Targets, critic_targets
from tests.learner.soft_value_iteration import (
    Responses,
    Table,
    TokenProblem,
    all_prefixes,
    along,
    expected_sum,
    formula_rewards,
    kl_divergence,
    objective,
    sample,
    soft_value_iteration,
)
from tests.learner.tiny_policy import build_tiny_policy, logprob_table
from tests.rollouts import scored_rollout

PROMPTS = [[0], [1, 1], [2, 0, 3], [3, 2]]  # no first token twice: else a prompt could continue another
VOCABULARY = 5
EOS = VOCABULARY - 1
NUM_TOKENS = 4
CUT_TOKENS = 2
BETA = 0.5  # not 1: a forgotten factor must show

STEPS = 40
SAMPLES_PER_PROMPT = 16
GROUPS_PER_PROMPT = 4  # in every batch
ALGORITHMS = ("ppo", "grpo", "rloo", "reinforce++")
CLOSE = 0.07  # of the gap may be missing; 0.02 to 0.046 is, over seeds and algorithms
FAR = 0.18  # of it must be missing after a mistake; 0.23 and more is

Records = list[ScoredRollout]


def make_learner(algorithm: str, folder: Path, *, truncation: str = "terminal", seed: int = 0) -> PPOLearner:
    """The only place that knows how a learner is configured. KL is in the reward for all algorithms."""
    return PPOLearner(
        str(folder),
        AlgorithmConfig.model_validate(
            {
                "name": algorithm,
                "kl_in": "reward",
                "kl_coef": BETA,
                "truncation": truncation,
                "value_coef": 2.0,
                "value_clip": 10.0,
            }
        ),
        TrainingConfig(
            batch_size=len(PROMPTS) * GROUPS_PER_PROMPT * SAMPLES_PER_PROMPT,
            samples_per_prompt=SAMPLES_PER_PROMPT,
            epochs=2,
            minibatches=4,
            learning_rate=2e-3,
            value_learning_rate=3e-2,
            schedule="linear",
            warmup_steps=4,
            dtype="float32",
        ),
        temperature=1.0,
        max_response_tokens=NUM_TOKENS,
        total_steps=STEPS,
        seed=seed,
    )


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_policy(tmp_path_factory.mktemp("tiny"), vocabulary=VOCABULARY, seed=2)


@pytest.fixture
def policy(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def problem(folder):
    """The reference is the model as it starts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(102)
    rewards = formula_rewards(PROMPTS, num_tokens=NUM_TOKENS, vocabulary=VOCABULARY, generator=generator)
    return TokenProblem(rewards, logprob_table(model, PROMPTS, num_tokens=NUM_TOKENS), BETA)


def random_policies(number: int) -> list[list[Tensor]]:
    """Tables far from the reference and from each other."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(PROMPTS), EOS**t, VOCABULARY) for t in range(NUM_TOKENS)]
    return [
        [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(-1) for shape in shapes]
        for _ in range(number)
    ]


# The problem and its solution.


def every_response(prompt: int, table: Table):
    """Each possible response with the table's numbers along it."""
    for length in range(1, NUM_TOKENS + 1):
        for tokens in product(range(VOCABULARY), repeat=length):
            ends = tokens[-1] == EOS or length == NUM_TOKENS
            if not ends or EOS in tokens[:-1]:
                continue
            numbers, prefix = [], 0
            for level, token in zip(table, tokens, strict=False):
                numbers.append(level[prompt, prefix, token].item())
                prefix = prefix * EOS + token
            yield tokens, numbers


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_the_optimum_is_the_reference_tilted_by_the_rewards_of_whole_responses(problem, prompt):
    # Of whole responses y: policy*(y) ∝ reference(y) exp(R(y) / beta), J* = beta log Σ_y reference(y) exp(R(y) / beta).
    values, optimal = soft_value_iteration(problem)
    rewards = {tokens: sum(numbers) for tokens, numbers in every_response(prompt, problem.rewards)}
    reference = {tokens: sum(numbers) for tokens, numbers in every_response(prompt, problem.reference_logprobs)}
    assert len(rewards) == 1 + 4 + 16 + 64 * 5  # the fourth token may be anything
    assert math.fsum(math.exp(logprob) for logprob in reference.values()) == pytest.approx(1, abs=1e-12)
    best = BETA * math.log(math.fsum(math.exp(reference[y] + rewards[y] / BETA) for y in rewards))
    assert values[prompt].item() == pytest.approx(best, abs=1e-12)
    for y, numbers in every_response(prompt, optimal):
        assert sum(numbers) == pytest.approx(reference[y] + (rewards[y] - best) / BETA, abs=1e-12)


def test_what_a_policy_misses_is_beta_times_its_kl_to_the_optimum(problem):
    problem = replace(problem, beta=0.3)
    values, optimal = soft_value_iteration(problem)
    torch.testing.assert_close(objective(problem, optimal), values, atol=1e-12, rtol=0)
    for policy in [problem.reference_logprobs, *random_policies(3)]:
        missing = values - objective(problem, policy)
        assert missing.min() > 0.1
        torch.testing.assert_close(missing, 0.3 * kl_divergence(policy, optimal), atol=1e-12, rtol=0)


def test_every_response_of_the_optimum_is_worth_its_value(problem):
    # R(y) - beta log policy*(y) / reference(y) = J*, whatever y: no variance, so any error of the sampler shows.
    values, optimal = soft_value_iteration(problem)
    responses = sample(optimal, samples_per_prompt=500, generator=torch.Generator().manual_seed(0))
    kl_R = (along(optimal, responses) - along(problem.reference_logprobs, responses)).sum(1)
    worth_R = along(problem.rewards, responses).sum(1) - BETA * kl_R
    torch.testing.assert_close(worth_R, values[responses.prompts_R], atol=1e-12, rtol=0)
    # And they are the policy's: their lengths are those expected, within four standard errors.
    lengths_PS = responses.mask_RT.sum(1).double().view(len(PROMPTS), -1)
    expected_P = expected_sum([torch.ones_like(level) for level in optimal], optimal)
    assert ((lengths_PS.mean(1) - expected_P).abs() < 4 * lengths_PS.std(1) / 500**0.5).all()
    assert responses.mask_RT.sum(1).unique().tolist() == [1, 2, 3, 4]


def test_the_table_holds_what_the_model_says_of_each_prefix_alone(policy, problem):
    for t, level in enumerate(problem.reference_logprobs):
        prefixes = all_prefixes(t, EOS).tolist()
        for prompt, prefix in product(range(len(PROMPTS)), {0, len(prefixes) // 3, len(prefixes) - 1}):
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([PROMPTS[prompt] + prefixes[prefix]])).logits[0, -1]
            torch.testing.assert_close(level[prompt, prefix], logits.double().log_softmax(-1), atol=1e-5, rtol=0)


# Training.


def cut_short(responses: Responses, *, share: float, generator: torch.Generator) -> Responses:
    """A share of the responses loses what comes after CUT_TOKENS tokens."""
    cut_R = torch.rand(len(responses.mask_RT), generator=generator) < share
    mask_RT = responses.mask_RT.clone()
    mask_RT[:, CUT_TOKENS:] &= ~cut_R[:, None]
    return replace(responses, mask_RT=mask_RT)


def to_records(problem: TokenProblem, responses: Responses, logprobs: Table, *, truncation: str, step: int) -> Records:
    """Scored rollouts; the score is the sum of the rewards of the tokens that are there.

    A response of full length is over: its score is whole. The engine calls it "length", which "terminal" truncation
    must treat like "stop"; with "bootstrap" it is "stop", and "length" are those that were cut.
    """
    scores = along(problem.rewards, responses).sum(1).tolist()
    behavior, reference = (along(table, responses).tolist() for table in (logprobs, problem.reference_logprobs))
    records = []
    for row, length in enumerate(responses.mask_RT.sum(1).tolist()):
        prompt = int(responses.prompts_R[row])
        tokens = responses.tokens_RT[row, :length].tolist()
        over = tokens[-1] == EOS or (length == NUM_TOKENS and truncation == "bootstrap")
        records.append(
            scored_rollout(
                f"step {step} response {row}",
                prompt=PROMPTS[prompt],
                response=tokens,
                behavior=behavior[row][:length],
                reference=reference[row][:length],
                versions=[step] * length,
                reward=scores[row],
                prompt_id=f"prompt {prompt}",
                group_id=f"step {step} group {row // SAMPLES_PER_PROMPT}",
                finish_reason="stop" if over else "length",
            )
        )
    return records


Mistake = Callable[[Records], Records]


def no_mistake(records: Records) -> Records:
    return records


def wrong_sign_of_kl(records: Records) -> Records:
    """log policy - log reference becomes its negative: the learner is paid for leaving the reference."""

    def mirrored(record: ScoredRollout) -> list[float]:
        pairs = zip(record.rollout.behavior_logprobs, record.reference_logprobs, strict=True)
        return [2 * policy - reference for policy, reference in pairs]

    return [replace(record, reference_logprobs=mirrored(record)) for record in records]


def no_mask(records: Records) -> Records:
    """Padding to the full length, with the log-probabilities of 0 that padding has in a batch, counts like tokens."""
    padded = []
    for record in records:
        rollout, missing = record.rollout, NUM_TOKENS - len(record.rollout.response_tokens)
        rollout = replace(
            rollout,
            response_tokens=rollout.response_tokens + [EOS] * missing,
            behavior_logprobs=rollout.behavior_logprobs + [0.0] * missing,
            weights_versions=rollout.weights_versions + rollout.weights_versions[:1] * missing,
        )
        padded.append(replace(record, rollout=rollout, reference_logprobs=record.reference_logprobs + [0.0] * missing))
    return padded


def score_and_bootstrap(
    experience: Experience, predicted: Predictions, scores_B: Tensor, config: AlgorithmConfig, *, kl_coef: float
) -> Targets:
    """`critic_targets` where a cut response keeps its score and gets the value of its last state as well."""
    lengths_B = experience.mask_BT.sum(dim=1)
    last_values_B = predicted.values_BU.gather(1, lengths_B[:, None]).squeeze(1)
    both_B = scores_B + last_values_B * experience.truncated_B
    called_finished = replace(experience, truncated_B=torch.zeros_like(experience.truncated_B))
    return critic_targets(called_finished, predicted, both_B, config, kl_coef=kl_coef)


def missing_share(problem: TokenProblem, logprobs: Table) -> float:
    """(J* - J(policy)) / (J* - J(reference)) over all prompts: 1 at the start, 0 at the optimum."""
    best = soft_value_iteration(problem)[0].mean()
    start = objective(problem, problem.reference_logprobs).mean()
    return float((best - objective(problem, logprobs).mean()) / (best - start))


def train(
    learner: PPOLearner,
    policy: Any,
    problem: TokenProblem,
    *,
    mistake: Mistake = no_mistake,
    cut_share: float = 0.0,
    seed: int = 0,
) -> float:
    """Train on responses that the policy samples, and return the share that is missing at the end.

    `policy` is a model as an engine holds it: it gets the learner's weights before each step.
    """
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        policy.load_state_dict(learner.weights())
        logprobs = logprob_table(policy, PROMPTS, num_tokens=NUM_TOKENS)
        responses = sample(logprobs, samples_per_prompt=GROUPS_PER_PROMPT * SAMPLES_PER_PROMPT, generator=generator)
        responses = cut_short(responses, share=cut_share, generator=generator)
        truncation = learner.algorithm.truncation
        records = to_records(problem, responses, logprobs, truncation=truncation, step=step)
        learner.step(mistake(records), training_version=step)
    policy.load_state_dict(learner.weights())
    return missing_share(problem, logprob_table(policy, PROMPTS, num_tokens=NUM_TOKENS))


def fast_alone(*names):
    """All algorithms; those that are not named take long and are for the slow suite."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in names)) for name in ALGORITHMS]


@pytest.mark.parametrize("algorithm", fast_alone("ppo", "grpo"))
def test_each_algorithm_comes_close_to_the_optimum(folder, policy, problem, algorithm):
    assert train(make_learner(algorithm, folder), policy, problem) < CLOSE


@pytest.mark.parametrize("mistake", [wrong_sign_of_kl, no_mask])
@pytest.mark.parametrize("algorithm", fast_alone("ppo"))
def test_a_wrong_sign_of_kl_or_no_mask_stays_far_from_it(folder, policy, problem, algorithm, mistake):
    assert train(make_learner(algorithm, folder), policy, problem, mistake=mistake) > FAR


def test_with_half_of_the_responses_cut_short_their_values_lead_close_to_it(folder, policy, problem):
    learner = make_learner("ppo", folder, truncation="bootstrap")
    assert train(learner, policy, problem, cut_share=0.5) < CLOSE


@pytest.mark.slow
def test_with_half_of_them_cut_short_score_and_value_together_stay_far_from_it(folder, policy, problem, monkeypatch):
    monkeypatch.setattr(ppo, "critic_targets", score_and_bootstrap)
    learner = make_learner("ppo", folder, truncation="bootstrap")
    assert train(learner, policy, problem, cut_share=0.5) > FAR
