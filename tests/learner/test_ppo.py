"""A step of the learner against the papers' formulas, written out one unpadded sequence at a time, in fp32."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.actor_critic import ActorCritic
from learner.experience import to_experience
from learner.ppo import PPOLearner
from tests.learner.by_hand import (
    EOS,
    NUM_TOKENS,
    TOY,
    alone,
    assert_same_gradients,
    gradients_of,
    loss_by_hand,
    new_learner,
    plain_copy,
    record_updates,
    targets_by_hand,
    tensors_of,
    toy_batch,
    whiten_by_hand,
)
from tests.rollouts import scored_rollout
from tests.tiny import build_tiny_model

ALGORITHMS = ["ppo", "grpo", "dr_grpo", "rloo", "reinforce++"]
METRICS = {
    "kl_to_reference", "entropy", "policy_loss", "value_loss", "clip_fraction", "explained_variance",
    "response_tokens_mean", "truncated_fraction", "lag_steps_max",
}  # fmt: skip
# Each part of the objective at least once, for algorithms that have it.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ppo": {"value_coef": 0.3, "kl_coef": 0.2, "gamma": 0.97},
    "ppo separate critic": {"critic": "separate", "value_coef": 0.3, "kl_coef": 0.2},
    "ppo bootstrap": {"truncation": "bootstrap", "value_coef": 0.3, "kl_coef": 0.2, "lam": 0.8},
    "ppo normalised values": {"normalise_values": True, "value_coef": 0.3, "kl_coef": 0.2},
    "ppo kl in loss": {"kl_in": "loss", "kl_coef": 0.2, "kl_estimator": "k2"},
    "ppo entropy": {"entropy_coef": 0.1},
    "ppo sequence": {"loss_aggregation": "sequence", "entropy_coef": 0.1, "kl_in": "loss"},
    "grpo": {"name": "grpo", "kl_coef": 0.2},
    "grpo entropy": {"name": "grpo", "kl_coef": 0.2, "entropy_coef": 0.1},
    "grpo kl in reward": {"name": "grpo", "kl_in": "reward", "kl_coef": 0.2},
    "grpo without kl": {"name": "grpo", "kl_coef": 0.0},
    "dapo": {"name": "grpo", "loss_aggregation": "token", "clip_high": 0.28, "kl_coef": 0.0},
    "dr_grpo": {"name": "dr_grpo", "kl_coef": 0.2, "kl_estimator": "k2"},
    "dr_grpo entropy": {"name": "dr_grpo", "entropy_coef": 0.1},
    "rloo": {"name": "rloo", "kl_coef": 0.2},
    "rloo sequence weights": {"name": "rloo", "kl_coef": 0.2, "behavior_weight_level": "sequence"},
    "reinforce++": {"name": "reinforce++", "kl_coef": 0.2},
    "reinforce++ constant": {"name": "reinforce++", "loss_aggregation": "constant", "entropy_coef": 0.1},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), tied=True, hidden_size=64)


@pytest.fixture(scope="module")
def critic(folder):
    """A plain copy of the weights that every PPO learner with a shared critic starts from here."""
    return plain_copy(folder, new_learner(folder))


def targets_of(learner: PPOLearner, batch):
    experience = to_experience(batch, token_budget=4096)
    return learner._targets(experience, learner._predict(experience, [list(range(len(batch)))]))


def ragged(tensor_BT, batch):
    return [row[: len(sample.rollout.response_tokens)].tolist() for row, sample in zip(tensor_BT, batch, strict=True)]


def assert_rows_close(rows, expected, tolerance=2e-5):
    for row, hand in zip(rows, expected, strict=True):
        assert row == pytest.approx(hand, abs=tolerance, rel=tolerance)


def finite_floats(metrics):
    assert {name: type(value) for name, value in metrics.items() if type(value) is not float} == {}
    assert {name: value for name, value in metrics.items() if not math.isfinite(value)} == {}
    return True


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_papers_objective(folder, objective):
    learner = new_learner(folder, OBJECTIVES[objective])
    plain = plain_copy(folder, learner)
    batch = toy_batch(plain)
    targets = targets_by_hand(plain, batch, learner.algorithm, kl_coef=learner.algorithm.kl_coef)
    updates = record_updates(learner)
    metrics = learner.step(batch, training_version=0)
    [(before, found)] = updates  # with normalised values the head was rescaled before its update
    loss, means = loss_by_hand(plain.take(before), batch, targets, learner.algorithm, kl_coef=learner.algorithm.kl_coef)
    loss.backward()
    expected = gradients_of(plain)
    assert_same_gradients(found, expected)

    assert means["weight_max"] == learner.algorithm.behavior_weight_cap > means["weight_min"]  # some are truncated
    assert metrics["policy_loss"] == pytest.approx(means["policy_loss"], abs=2e-5)
    assert metrics["value_loss"] == pytest.approx(means["value_loss"], rel=1e-4, abs=1e-6)
    kl_loss = means["kl_loss"] if learner.algorithm.kl_in_loss and learner.algorithm.kl_coef else 0.0
    assert metrics["kl_loss"] == pytest.approx(kl_loss, rel=1e-4, abs=1e-7)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("objective", ["ppo kl in loss", "ppo entropy", "grpo", "dr_grpo entropy", "rloo"])
def test_tokens_older_than_the_bound_are_left_out_of_the_loss(folder, objective):
    """The first half of each response is older, and of one response all: streaming.stale_tokens mask."""
    learner = new_learner(folder, OBJECTIVES[objective], mask_older_than=1)
    plain = plain_copy(folder, learner)
    batch = [
        replace(sample, rollout=replace(sample.rollout, weights_versions=[3] * (n // 2) + [4] * (n - n // 2)))
        for sample in toy_batch(plain)
        if (n := len(sample.rollout.response_tokens))
    ]
    batch[0] = replace(
        batch[0], rollout=replace(batch[0].rollout, weights_versions=[2] * len(batch[0].rollout.response_tokens))
    )
    targets = targets_by_hand(plain, batch, learner.algorithm, kl_coef=learner.algorithm.kl_coef)
    updates = record_updates(learner)
    metrics = learner.step(batch, training_version=5)
    [(before, found)] = updates
    config = learner.algorithm
    loss, means = loss_by_hand(plain.take(before), batch, targets, config, kl_coef=config.kl_coef, oldest_version=4)
    loss.backward()
    assert_same_gradients(found, gradients_of(plain))
    assert metrics["policy_loss"] == pytest.approx(means["policy_loss"], abs=2e-5)
    assert metrics["lag_steps_max"] == 1
    versions = [version for sample in batch for version in sample.rollout.weights_versions]
    assert metrics["masked_token_fraction"] == pytest.approx(sum(each < 4 for each in versions) / len(versions))


def test_a_batch_of_stale_tokens_alone_changes_nothing(folder):
    learner = new_learner(folder, {"name": "grpo"}, mask_older_than=1)
    before = tensors_of(learner)
    metrics = learner.step(toy_batch(plain_copy(folder, learner)), training_version=2)
    assert finite_floats(metrics)
    assert metrics["masked_token_fraction"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(learner).items())


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo"])
def test_without_a_reference_the_step_is_that_of_kl_coef_0(folder, name):
    """algorithm.monitor_kl false: responses come without reference log-probabilities."""
    with_reference = new_learner(folder, {"name": name, "kl_coef": 0.0})
    batch = toy_batch(plain_copy(folder, with_reference))
    without = new_learner(folder, {"name": name, "kl_coef": 0.0, "monitor_kl": False})
    metrics = [
        with_reference.step(batch, training_version=0),
        without.step([replace(sample, reference_logprobs=[]) for sample in batch], training_version=0),
    ]
    assert metrics[0]["kl_to_reference"] != 0 == metrics[1]["kl_to_reference"]
    assert metrics[0] | {"kl_to_reference": 0.0} == metrics[1]
    tensors = tensors_of(with_reference)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in tensors_of(without).items())


def test_a_reference_that_is_missing_is_no_reference_of_0(folder):
    learner = new_learner(folder, {"name": "grpo"})
    batch = [replace(sample, reference_logprobs=[]) for sample in toy_batch(plain_copy(folder, learner))]
    with pytest.raises(ValueError, match="without reference_logprobs"):
        learner.step(batch, training_version=0)


@pytest.mark.parametrize(
    ("objective", "rate"),
    [
        ("ppo", 0.02),
        ("ppo normalised values", 0.02),
        ("grpo entropy", 0.02),
        ("dr_grpo", 0.02),
        ("rloo", 0.004),
        ("reinforce++", 0.004),
    ],
)
def test_a_later_update_keeps_the_targets_and_clips(folder, objective, rate):
    """Four updates by SGD, two minibatches twice: each one's gradient, at the weights it started from."""
    settings = OBJECTIVES[objective] | {"value_clip": 0.05}
    learner = new_learner(folder, settings, epochs=2, minibatches=2)
    plain = plain_copy(folder, learner)
    batch = toy_batch(plain, noise=0.3)
    kl_coef = learner.algorithm.kl_coef
    targets = targets_by_hand(plain, batch, learner.algorithm, kl_coef=kl_coef)
    minibatches = learner._minibatches(to_experience(batch, token_budget=4096), 0)
    updates = record_updates(learner, sgd_rate=rate)
    metrics = learner.step(batch, training_version=0)
    clip_fractions = []
    for rows, (before, found) in zip(minibatches, updates, strict=True):
        plain.zero_grad()
        loss, means = loss_by_hand(plain.take(before), batch, targets, learner.algorithm, kl_coef=kl_coef, rows=rows)
        loss.backward()
        assert_same_gradients(found, gradients_of(plain), tolerance=1e-4)
        tokens = sum(len(batch[row].rollout.response_tokens) for row in rows)
        clip_fractions.append(means["clip_fraction"] * tokens)
    assert clip_fractions[0] == 0 < sum(clip_fractions)
    assert metrics["clip_fraction"] == pytest.approx(sum(clip_fractions) / (2 * NUM_TOKENS))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_minibatches_are_whole_groups_each_response_once_an_epoch(folder, name):
    learner = new_learner(folder, {"name": name}, epochs=3, minibatches=2, value_head=False)
    experience = to_experience(toy_batch(plain_copy(folder, learner)), token_budget=4096)
    minibatches = learner._minibatches(experience, 5)
    assert len(minibatches) == 6
    for epoch in range(3):
        pair = minibatches[2 * epoch : 2 * epoch + 2]
        assert sorted(pair[0] + pair[1]) == list(range(len(TOY)))
        assert {TOY[row].group for row in pair[0]}.isdisjoint({TOY[row].group for row in pair[1]})
    assert len({tuple(rows) for rows in minibatches[::2]}) > 1  # another order each epoch


# --- targets ---------------------------------------------------------------------------------------------------------


def test_values_start_at_zero(folder, critic):
    targets = targets_of(new_learner(folder, value_head=False), toy_batch(critic))
    assert targets.values_BT.abs().max() == 0


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_targets_are_those_of_the_papers(folder, critic, truncation):
    learner = new_learner(folder, {"truncation": truncation, "kl_coef": 0.3, "gamma": 0.9, "lam": 0.8})
    batch = toy_batch(critic)
    targets = targets_of(learner, batch)
    hand = targets_by_hand(critic, batch, learner.algorithm, kl_coef=0.3)
    assert_rows_close(ragged(targets.returns_BT, batch), hand.returns)
    assert_rows_close(ragged(targets.values_BT, batch), hand.old_values)
    assert_rows_close(ragged(targets.advantages_BT, batch), hand.advantages, tolerance=1e-4)
    plain = [[r - v for r, v in zip(*rows, strict=True)] for rows in zip(hand.returns, hand.old_values, strict=True)]
    assert_rows_close(hand.advantages, whiten_by_hand(plain), tolerance=1e-9)


def returns_with(learner, batch, *, row, reward):
    changed = list(batch)
    changed[row] = replace(batch[row], reward=reward)
    return ragged(targets_of(learner, changed).returns_BT, batch)


@pytest.mark.parametrize("row", [row for row, toy in enumerate(TOY) if toy.finish_reason == "length"])
def test_a_truncated_response_has_a_score_or_a_bootstrap_never_both(folder, critic, row):
    length = len(TOY[row].response)
    undiscounted = {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0}
    terminal = new_learner(folder, {"truncation": "terminal"} | undiscounted)
    batch = toy_batch(critic)
    # Undiscounted returns are the sum of the rewards to come: the score, and no value.
    assert returns_with(terminal, batch, row=row, reward=5.0)[row] == pytest.approx([5.0] * length, abs=1e-5)

    bootstrap = new_learner(folder, {"truncation": "bootstrap"} | undiscounted)
    with torch.no_grad():
        last_value = alone(critic, TOY[row].prompt, TOY[row].response).values_U[-1].item()
    assert abs(last_value) > 0.05
    assert returns_with(bootstrap, batch, row=row, reward=5.0)[row] == pytest.approx([last_value] * length, abs=1e-5)
    # A finished response is scored in either mode.
    assert returns_with(bootstrap, batch, row=3, reward=5.0)[3] == pytest.approx([5.0] * 5, abs=1e-5)


def test_the_penalty_sits_at_each_token_and_the_score_at_the_last(folder, critic):
    learner = new_learner(folder, {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.5}, value_head=False)
    batch = toy_batch(critic)
    targets = targets_of(learner, batch)
    for row, returns in enumerate(ragged(targets.returns_BT, batch)):
        with torch.no_grad():
            logprobs = alone(critic, TOY[row].prompt, TOY[row].response).logprobs_T.tolist()
        # With gamma = lam = 1 and values of 0, the reward at t is what the return loses from t to t + 1.
        rewards = [now - after for now, after in zip(returns, [*returns[1:], 0.0], strict=True)]
        penalties = [-0.5 * (lp - ref) for lp, ref in zip(logprobs, batch[row].reference_logprobs, strict=True)]
        assert rewards == pytest.approx([*penalties[:-1], penalties[-1] + TOY[row].reward], abs=2e-5)


def test_scores_are_divided_by_their_running_deviation_over_steps(folder):
    learner = new_learner(folder, {"name": "dr_grpo", "normalise_rewards": True, "kl_coef": 0.0})
    batch = toy_batch(plain_copy(folder, learner))
    louder = [replace(sample, reward=10 * sample.reward) for sample in batch]
    seen: list[float] = []
    for each in (batch, louder):
        seen += [sample.reward for sample in each]
        mean = sum(seen) / len(seen)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in seen) / len(seen))
        targets = learner._targets(to_experience(each, token_budget=4096), None)
        rewards = [sample.reward / std for sample in each]
        assert targets.advantages_BT[0, 0].item() == pytest.approx(rewards[0] - sum(rewards[:3]) / 3, rel=1e-5)


# DAPO, eq. 13: limit 8, buffer 4: nothing up to 4 tokens, a quarter of the penalty for each one more.
def test_long_responses_are_penalised_as_published(folder):
    settings = {"name": "dr_grpo", "overlong_buffer_tokens": 4, "overlong_penalty": 2.0, "kl_coef": 0.0}
    learner = new_learner(folder, settings)
    batch = [
        scored_rollout(f"t{n}", group_id="one", prompt=[5], response=[7] * length, reward=1.0)
        for n, length in enumerate([3, 4, 5, 8])
    ]
    targets = learner._targets(to_experience(batch, token_budget=4096), None)
    rewards = [1.0, 1.0, 0.5, -1.0]
    mean = sum(rewards) / 4
    assert targets.advantages_BT[:, 0].tolist() == pytest.approx([reward - mean for reward in rewards])


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_metrics_are_finite_floats_and_what_their_names_say(folder, name, epochs):
    learner = new_learner(folder, {"name": name}, epochs=epochs, minibatches=epochs)
    plain = plain_copy(folder, learner)
    batch = toy_batch(plain, version=3)
    batch[0] = replace(batch[0], rollout=replace(batch[0].rollout, weights_versions=[4, 5, 5]))
    with torch.no_grad():
        each = [alone(plain, row.prompt, row.response) for row in TOY]
    metrics = learner.step(batch, training_version=5)
    assert metrics.keys() >= METRICS
    assert finite_floats(metrics)

    flat = torch.cat([one.logprobs_T for one in each])
    reference = torch.tensor([number for sample in batch for number in sample.reference_logprobs])
    behavior = torch.tensor([number for sample in batch for number in sample.rollout.behavior_logprobs])
    assert metrics["kl_to_reference"] == pytest.approx(float((flat - reference).sum()) / len(TOY), abs=1e-4)
    assert metrics["entropy"] == pytest.approx(float(torch.cat([one.entropies_T for one in each]).mean()), abs=1e-5)
    assert metrics["behavior_logprob_gap_mean"] == pytest.approx(float((flat - behavior).abs().mean()), abs=1e-5)
    assert metrics["behavior_logprob_gap_max"] == pytest.approx(float((flat - behavior).abs().max()), abs=2e-5)
    weights = (flat - behavior).exp()
    truncated = float((weights > learner.algorithm.behavior_weight_cap).float().mean())
    assert metrics["truncated_weight_fraction"] == pytest.approx(truncated) != 0
    assert metrics["response_tokens_mean"] == NUM_TOKENS / len(TOY)
    assert metrics["truncated_fraction"] == 3 / 8
    assert metrics["lag_steps_max"] == 2  # trained at version 5, the oldest token is of version 3
    assert metrics["lag_steps_mean"] == (1 + 7 * 2) / 8


def test_explained_variance_is_one_minus_that_of_the_errors(folder, critic):
    learner = new_learner(folder)
    batch = toy_batch(critic)
    hand = targets_by_hand(critic, batch, learner.algorithm, kl_coef=learner.kl_coef)
    returns, values = (torch.tensor([x for row in rows for x in row]) for rows in (hand.returns, hand.old_values))
    expected = 1 - float((returns - values).var(correction=0) / returns.var(correction=0))
    assert learner.step(batch, training_version=0)["explained_variance"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_metrics_of_all_algorithms_have_the_same_names(folder, name):
    # One response, of one token, one group: no variance of anything.
    learner = new_learner(folder, {"name": name}, minibatches=2)
    metrics = learner.step([scored_rollout(response=[7])], training_version=0)
    assert finite_floats(metrics)
    expected = new_learner(folder).step([scored_rollout(response=[7])], training_version=0)
    assert metrics.keys() == expected.keys()


# --- what a step does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["shared_prompts", "padded"])
def test_the_first_ratio_is_one_although_the_model_has_dropout(tmp_path, packing):
    with_dropout = build_tiny_model(tmp_path, tied=True, hidden_size=64)
    config = json.loads((with_dropout / "config.json").read_text())
    (with_dropout / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    learner = new_learner(with_dropout, packing=packing)
    assert learner.policy.policy.config.attention_dropout == 0.5
    plain = plain_copy(with_dropout, learner)
    batch = toy_batch(plain)
    assert_rows_close(
        ragged(targets_of(learner, batch).proximal_logprobs_BT, batch),
        [alone(plain, row.prompt, row.response).logprobs_T.tolist() for row in TOY],
    )
    metrics = learner.step(batch, training_version=0)
    assert metrics["ratio_max"] == 1
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction"] == 0


GOOD, BAD = 100, 200


@pytest.mark.parametrize(("up", "down"), [(GOOD, BAD), (BAD, GOOD)])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_policy_learns_what_is_rewarded(folder, name, up, down):
    learner = new_learner(folder, {"name": name, "kl_coef": 0.0}, value_head=False, epochs=2)
    prompt = [5, 6]

    plain = plain_copy(folder, learner)

    @torch.no_grad()
    def logprobs():
        plain.take(tensors_of(learner))
        return [alone(plain, prompt, [token]).logprobs_T[0].item() for token in (up, down)]

    history = [logprobs()]
    for step in range(4):
        tokens = zip((up, down), history[-1], (1.0, -1.0), strict=True)
        batch = [
            scored_rollout(f"{step}-{n}", prompt=prompt, response=[token], behavior=[behavior], reward=reward)
            for n, (token, behavior, reward) in enumerate([*tokens] * 2)
        ]
        learner.step(batch, training_version=step)
        history.append(logprobs())
    ups, downs = zip(*history, strict=True)
    assert sorted(ups) == list(ups)
    assert sorted(downs, reverse=True) == list(downs)
    assert ups[-1] - ups[0] > 0.5
    assert downs[-1] - downs[0] < -0.5


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e9])
def test_the_gradient_is_clipped_by_its_global_norm(folder, critic, max_grad_norm):
    learner = new_learner(folder, max_grad_norm=max_grad_norm)
    [before, after] = [new_learner(folder), learner]
    updates = [record_updates(each) for each in (before, after)]
    metrics = [each.step(toy_batch(critic), training_version=0) for each in (before, after)]
    assert metrics[0]["grad_norm"] == metrics[1]["grad_norm"] > 1  # reported as it was
    share = min(1.0, max_grad_norm / metrics[0]["grad_norm"])
    expected = {name: gradient * share for name, gradient in updates[0][0][1].items()}
    for name, gradient in updates[1][0][1].items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-9)


# Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2), beta <- beta (1 + e n / horizon).
# beta 0.1, target 6, horizon 10000 as published, n = 512 responses.
@pytest.mark.parametrize(
    ("kl", "expected"),
    [(12.0, 0.101024), (6.6, 0.100512), (6.0, 0.1), (5.4, 0.099488), (0.0, 0.098976), (-50.0, 0.098976)],
)
def test_the_kl_coefficient_adapts_as_published(folder, kl, expected):
    learner = new_learner(folder, {"kl_coef": 0.1, "kl_target": 6.0, "kl_horizon": 10_000})
    learner._adapt_kl(kl, 512)
    assert learner.kl_coef == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_kl_coefficient_stays_without_a_target(folder, critic, name):
    learner = new_learner(folder, {"name": name, "kl_coef": 0.1})
    assert learner.step(toy_batch(critic), training_version=0)["kl_coef"] == 0.1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_adapts_the_kl_coefficient_to_the_kl_of_a_response(folder, critic, name):
    learner = new_learner(folder, {"name": name, "kl_coef": 0.1, "kl_target": 10.0, "kl_horizon": 80})
    with torch.no_grad():
        references = [alone(critic, row.prompt, row.response).logprobs_T - 2.0 for row in TOY]
    batch = [replace(s, reference_logprobs=ref.tolist()) for s, ref in zip(toy_batch(critic), references, strict=True)]
    metrics = learner.step(batch, training_version=0)
    # 2 nats a token, 24 tokens, 8 responses: 6 a response, error clipped at -0.2, 8 of 80 responses.
    assert metrics["kl_to_reference"] == pytest.approx(6.0, abs=1e-4)
    assert metrics["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 80))
    assert learner.kl_coef == metrics["kl_coef"]


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo"])
def test_the_coefficient_of_now_weighs_the_penalty(folder, name):
    """Not the one of the configuration, which is only where it starts."""
    adapted = new_learner(folder, {"name": name, "kl_coef": 0.1, "kl_target": 1.0}, value_head=False)
    adapted.kl_coef = 0.4
    fixed = new_learner(folder, {"name": name, "kl_coef": 0.4}, value_head=False)
    batch = toy_batch(plain_copy(folder, fixed))
    found, expected = (record_updates(learner) for learner in (adapted, fixed))
    for learner in (adapted, fixed):
        learner.step(batch, training_version=0)
    assert all(torch.equal(gradient, expected[0][1][key]) for key, gradient in found[0][1].items())


def test_the_order_of_minibatches_follows_from_seed_and_version(folder, critic):
    first, same, other_seed = (new_learner(folder, minibatches=4, seed=seed) for seed in (0, 0, 1))
    for learner in (first, same, other_seed):
        learner.step(toy_batch(critic), training_version=0)
    weights = [learner.weights()["model.embed_tokens.weight"] for learner in (first, same, other_seed)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    experience = to_experience(toy_batch(critic), token_budget=4096)
    assert first._minibatches(experience, 0) != first._minibatches(experience, 1)


def test_activation_checkpointing_changes_nothing_but_memory(folder, critic):
    plain, recomputing = new_learner(folder), new_learner(folder, activation_checkpointing=True)
    updates = [record_updates(learner) for learner in (plain, recomputing)]
    assert plain.step(toy_batch(critic), training_version=0) == recomputing.step(toy_batch(critic), training_version=0)
    for name, gradient in updates[0][0][1].items():
        assert torch.equal(gradient, updates[1][0][1][name]), name
    assert plain.weights().keys() == recomputing.weights().keys()


def test_a_bad_record_is_refused_by_trajectory_and_nothing_is_trained(folder, critic):
    learner = new_learner(folder)
    batch = toy_batch(critic)
    before = tensors_of(learner)
    with pytest.raises(ValueError, match="trajectory t2: reward is not finite"):
        learner.step([*batch[:2], replace(batch[2], reward=math.nan), *batch[3:]], training_version=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(learner).items())


def test_a_model_that_changes_its_logits_afterwards_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        ActorCritic(model)


@pytest.mark.parametrize("epochs", [1, 2])
def test_fewer_groups_than_minibatches_are_scored_once(folder, critic, epochs):
    learner = new_learner(folder, minibatches=4, epochs=epochs)
    batch = [sample for sample in toy_batch(critic) if sample.rollout.group_id in ("a", "b")]
    learner.step(batch, training_version=0)
    assert learner.passes == 2 + 2 * epochs  # two groups, one micro-batch each: the proximal pass and the updates


def test_the_toy_has_what_the_tests_need():
    assert sum(len(row.response) for row in TOY) == NUM_TOKENS
    assert any(EOS in row.response[:-1] for row in TOY)
