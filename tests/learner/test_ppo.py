"""One PPO step against the papers' formulas, written out one unpadded sequence at a time, on a tiny model in fp32.

B responses, T response tokens, U = T + 1.
"""

import copy
import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from contracts.config import PPOConfig
from learner.experience import micro_batches, to_experience
from learner.ppo import ActorCritic, PPOLearner
from tests.rollouts import scored_rollout
from tests.tiny import build_tiny_model

TEMPERATURE = 0.7
EOS = 2
# Prompt, response, reward, finish reason. All lengths differ, so that sorting by length leaves no ties.
TOY: list[tuple[list[int], list[int], float, str]] = [
    ([30, 31, 32], [33, 34, EOS], 1.0, "stop"),
    ([40], [41, EOS, 42, 43, EOS], -0.5, "stop"),
    ([50, 51], [52], 2.0, "length"),
    ([60, 61, 62, 63, 64], [65, 66, 67, 68, 69, 70], 0.25, "length"),
]
METRICS = {
    "kl_to_reference", "entropy", "policy_loss", "value_loss", "clip_fraction", "explained_variance",
    "response_tokens_mean", "truncated_fraction", "lag_steps_max",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), tied=True, hidden_size=64)


def new_learner(folder, *, seed=0, value_head=True, **settings: Any) -> PPOLearner:
    """fp32; the value head gets weights of its own, because it starts at zero."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "epochs": 1,
        "minibatches": 1,
        "batch_size": len(TOY),
        "learning_rate": 1e-3,
        "max_grad_norm": 1e9,
    }
    learner = PPOLearner(str(folder), PPOConfig(**defaults | settings), temperature=TEMPERATURE, seed=seed)
    if value_head:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            learner.policy.value_head.linear.weight.normal_(std=0.2, generator=generator)
            learner.policy.value_head.linear.bias.fill_(0.3)
    return learner


def toy_batch(policy: ActorCritic, *, versions=0, seed=0):
    """TOY with behavior and reference log-probabilities somewhat off those of the policy."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for number, (prompt, response, reward, finish_reason) in enumerate(TOY):
        with torch.no_grad():
            logprobs, _, _ = alone(policy, prompt, response)
        noise = 0.6 * torch.randn(2, len(response), generator=generator)
        batch.append(
            scored_rollout(
                f"t{number}",
                prompt=prompt,
                response=response,
                behavior=(logprobs + noise[0]).tolist(),
                reference=(logprobs + noise[1]).tolist(),
                versions=[versions] * len(response),
                reward=reward,
                finish_reason=finish_reason,
            )
        )
    return batch


def alone(policy: ActorCritic, prompt, response):
    """Log-probs [T], values [U] and entropies [T] of one sequence by itself, from plain log_softmax."""
    output = policy.model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    logprobs_LV = torch.log_softmax(output.logits[0].float() / TEMPERATURE, dim=-1)
    first = len(prompt) - 1
    logprobs = torch.stack([logprobs_LV[first + t, token] for t, token in enumerate(response)])
    head = policy.value_head.linear
    values = output.hidden_states[-1][0, first:] @ head.weight[0] + head.bias[0]
    entropies = -(logprobs_LV.exp() * logprobs_LV).sum(-1)[first:-1]
    return logprobs, values, entropies


def gae_by_hand(rewards, values, last_value, *, gamma, lam):
    """Schulman et al. 2016, eq. 16, as the double sum."""
    after = [*values[1:], last_value]
    deltas = [
        reward + gamma * next_value - value for reward, next_value, value in zip(rewards, after, values, strict=True)
    ]
    advantages = [
        sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas))) for t in range(len(deltas))
    ]
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def targets_by_hand(policy: ActorCritic, batch, config: PPOConfig, *, kl_coef):
    """Advantages before whitening and returns, a list of floats for each response."""
    advantages, returns = [], []
    for sample in batch:
        rollout = sample.rollout
        with torch.no_grad():
            logprobs, values, _ = alone(policy, rollout.prompt_tokens, rollout.response_tokens)
        pairs = zip(logprobs.tolist(), sample.reference_logprobs, strict=True)
        rewards = [-kl_coef * (logprob - reference) for logprob, reference in pairs]
        *values, last_value = values.tolist()
        if config.truncation == "bootstrap" and rollout.finish_reason == "length":
            pass  # the value of the last state instead of a score
        else:
            rewards[-1] += sample.reward
            last_value = 0.0
        row = gae_by_hand(rewards, values, last_value, gamma=config.gamma, lam=config.lam)
        advantages.append(row[0])
        returns.append(row[1])
    return advantages, returns


def whiten_by_hand(rows):
    flat = [number for row in rows for number in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((number - mean) ** 2 for number in flat) / len(flat))
    return [[(number - mean) / std for number in row] for row in rows]


def ragged(tensor_BT, batch):
    return [row[: len(sample.rollout.response_tokens)].tolist() for row, sample in zip(tensor_BT, batch, strict=True)]


def assert_rows_close(rows, expected, tolerance=2e-5):
    for row, hand in zip(rows, expected, strict=True):
        assert row == pytest.approx(hand, abs=tolerance, rel=tolerance)


def tensors_of(learner):
    return {name: tensor.clone() for name, tensor in learner.policy.state_dict().items()}


def gradients_of(policy: ActorCritic):
    gradients = {}
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return gradients


def test_a_padded_batch_gives_what_each_sequence_alone_gives(folder):
    policy = new_learner(folder).policy
    [micro] = micro_batches(to_experience(toy_batch(policy)), range(len(TOY)), token_budget=999, pad_token=EOS)
    predicted = policy(micro.responses, temperature=TEMPERATURE, with_entropy=True)
    for at, row in enumerate(micro.rows.tolist()):
        prompt, response, _, _ = TOY[row]
        logprobs, values, entropies = alone(policy, prompt, response)
        torch.testing.assert_close(predicted.logprobs_BT[at, : len(response)], logprobs, atol=2e-5, rtol=0)
        torch.testing.assert_close(predicted.values_BU[at, : len(response) + 1], values, atol=2e-5, rtol=0)
        torch.testing.assert_close(predicted.entropy_BT[at, : len(response)], entropies, atol=2e-5, rtol=0)
        torch.testing.assert_close(predicted.values_BU[at, -1], values[-1], atol=2e-5, rtol=0)


def test_the_first_ratio_is_one_although_the_model_has_dropout(folder, tmp_path):
    with_dropout = build_tiny_model(tmp_path, tied=True, hidden_size=64)
    config = json.loads((with_dropout / "config.json").read_text())
    (with_dropout / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    learner = new_learner(with_dropout)
    assert learner.policy.model.config.attention_dropout == 0.5
    metrics = learner.step(toy_batch(learner.policy), training_version=0)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["clip_fraction"] == 0


def test_values_start_at_zero(folder):
    learner = new_learner(folder, value_head=False)
    targets, _ = learner._targets(to_experience(toy_batch(learner.policy)))
    assert targets.values_BT.abs().max() == 0


@pytest.mark.parametrize("micro_batch_tokens", [1, 24, 4096])
def test_the_gradient_is_that_of_the_papers_objective_whatever_the_micro_batches(folder, micro_batch_tokens):
    learner = new_learner(folder, micro_batch_tokens=micro_batch_tokens, value_coef=0.3, kl_coef=0.2, gamma=0.97)
    batch = toy_batch(learner.policy)
    config = learner.config
    by_hand = copy.deepcopy(learner.policy)
    advantages, returns = targets_by_hand(by_hand, batch, config, kl_coef=0.2)
    num_tokens = sum(len(response) for _, response, _, _ in TOY)
    loss = torch.zeros(())
    weights = []
    for sample, row_advantages, row_returns in zip(batch, whiten_by_hand(advantages), returns, strict=True):
        logprobs, values, _ = alone(by_hand, sample.rollout.prompt_tokens, sample.rollout.response_tokens)
        for t, behavior in enumerate(sample.rollout.behavior_logprobs):
            ratio = (logprobs[t] - logprobs[t].detach()).exp()  # 1: nothing is clipped yet
            weight = min(math.exp(logprobs[t].item() - behavior), config.behavior_weight_cap)
            weights.append(weight)
            loss = loss - weight * ratio * row_advantages[t] / num_tokens
            loss = loss + config.value_coef * 0.5 * (values[t] - row_returns[t]) ** 2 / num_tokens
    assert max(weights) == config.behavior_weight_cap > min(weights)  # some are truncated, some are not
    loss.backward()

    learner.step(batch, training_version=0)
    expected = gradients_of(by_hand)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
    for name, gradient in gradients_of(learner.policy).items():
        atol = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=1e-4)


def test_parameters_after_a_step_do_not_depend_on_the_micro_batches(folder):
    after, gradients = [], {}
    for micro_batch_tokens in (1, 24, 4096):
        learner = new_learner(folder, micro_batch_tokens=micro_batch_tokens, minibatches=2)
        learner.step(toy_batch(learner.policy), training_version=0)
        after.append(dict(learner.policy.named_parameters()))
        gradients = gradients_of(learner.policy)
    # Adam turns the least gradient into a full step of either sign: compare where there is one to speak of.
    compared = 0
    for name, gradient in gradients.items():
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        compared += int(clear.sum())
        for other in after[1:]:
            torch.testing.assert_close(after[0][name][clear], other[name][clear], atol=2e-5, rtol=0)
    assert compared > 10_000


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_targets_are_those_of_the_papers(folder, truncation):
    learner = new_learner(folder, truncation=truncation, kl_coef=0.3, gamma=0.9, lam=0.8)
    batch = toy_batch(learner.policy)
    targets, _ = learner._targets(to_experience(batch))
    advantages, returns = targets_by_hand(learner.policy, batch, learner.config, kl_coef=0.3)
    assert_rows_close(ragged(targets.returns_BT, batch), returns)
    assert_rows_close(ragged(targets.advantages_BT, batch), whiten_by_hand(advantages), tolerance=1e-4)


def returns_with(learner, batch, *, row, reward):
    changed = list(batch)
    changed[row] = replace(batch[row], reward=reward)
    targets, _ = learner._targets(to_experience(changed))
    return ragged(targets.returns_BT, batch)


@pytest.mark.parametrize("row", [2, 3])  # the truncated ones
def test_a_truncated_response_has_a_score_or_a_bootstrap_never_both(folder, row):
    length = len(TOY[row][1])
    terminal = new_learner(folder, truncation="terminal", gamma=1.0, lam=1.0, kl_coef=0.0)
    batch = toy_batch(terminal.policy)
    # Undiscounted returns are the sum of the rewards to come: the score, and no value.
    assert returns_with(terminal, batch, row=row, reward=5.0)[row] == pytest.approx([5.0] * length, abs=1e-5)

    bootstrap = new_learner(folder, truncation="bootstrap", gamma=1.0, lam=1.0, kl_coef=0.0)
    with torch.no_grad():
        last_value = alone(bootstrap.policy, *TOY[row][:2])[1][-1].item()
    assert abs(last_value) > 0.05
    assert returns_with(bootstrap, batch, row=row, reward=5.0)[row] == pytest.approx([last_value] * length, abs=1e-5)
    # A finished response is scored in either mode.
    assert returns_with(bootstrap, batch, row=1, reward=5.0)[1] == pytest.approx([5.0] * 5, abs=1e-5)


def test_the_penalty_sits_at_each_token_and_the_score_at_the_last(folder):
    learner = new_learner(folder, value_head=False, gamma=1.0, lam=1.0, kl_coef=0.5)
    batch = toy_batch(learner.policy)
    targets, _ = learner._targets(to_experience(batch))
    for row, returns in enumerate(ragged(targets.returns_BT, batch)):
        prompt, response, reward, _ = TOY[row]
        with torch.no_grad():
            logprobs = alone(learner.policy, prompt, response)[0].tolist()
        # With gamma = lam = 1 and values of 0, the reward at t is what the return loses from t to t + 1.
        rewards = [now - after for now, after in zip(returns, [*returns[1:], 0.0], strict=True)]
        penalties = [-0.5 * (lp - ref) for lp, ref in zip(logprobs, batch[row].reference_logprobs, strict=True)]
        assert rewards == pytest.approx([*penalties[:-1], penalties[-1] + reward], abs=2e-5)


def test_metrics_are_finite_floats_and_what_their_names_say(folder):
    learner = new_learner(folder, epochs=2, minibatches=2)
    batch = toy_batch(learner.policy, versions=3)
    batch[0] = replace(batch[0], rollout=replace(batch[0].rollout, weights_versions=[4, 5, 5]))
    with torch.no_grad():
        each = [alone(learner.policy, prompt, response) for prompt, response, _, _ in TOY]
    metrics = learner.step(batch, training_version=5)
    assert metrics.keys() >= METRICS
    assert {name: type(value) for name, value in metrics.items() if type(value) is not float} == {}
    assert {name: value for name, value in metrics.items() if not math.isfinite(value)} == {}

    drift = sum(
        logprob - reference
        for (logprobs, _, _), sample in zip(each, batch, strict=True)
        for logprob, reference in zip(logprobs.tolist(), sample.reference_logprobs, strict=True)
    )
    assert metrics["kl_to_reference"] == pytest.approx(drift / 4, abs=1e-4)
    assert metrics["entropy"] == pytest.approx(float(torch.cat([one[2] for one in each]).mean()), abs=1e-5)
    assert metrics["response_tokens_mean"] == 15 / 4
    assert metrics["truncated_fraction"] == 0.5
    assert metrics["lag_steps_max"] == 2  # trained at version 5, the oldest token is of version 3
    assert metrics["lag_steps_mean"] == (1 + 2 + 2 + 2) / 4


def test_an_absurd_score_leaves_metrics_and_parameters_finite(folder):
    # 1e30 is finite in float32, its square is not: that minibatch is left out, the other one trains.
    learner = new_learner(folder, minibatches=2)
    batch = toy_batch(learner.policy)
    before = tensors_of(learner)
    metrics = learner.step([replace(batch[0], reward=1e30), *batch[1:]], training_version=0)
    assert {name: value for name, value in metrics.items() if not math.isfinite(value)} == {}
    assert metrics["skipped_minibatches"] == 1
    after = tensors_of(learner)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


GOOD, BAD = 100, 200


@pytest.mark.parametrize(("up", "down"), [(GOOD, BAD), (BAD, GOOD)])
def test_the_policy_learns_what_is_rewarded(folder, up, down):
    learner = new_learner(folder, value_head=False, kl_coef=0.0, epochs=2)
    prompt = [5, 6]

    def logprob(token):
        with torch.no_grad():
            return alone(learner.policy, prompt, [token])[0].item()

    history = [(logprob(up), logprob(down))]
    for step in range(4):
        batch = [
            scored_rollout(f"{step}-{n}", prompt=prompt, response=[token], behavior=[logprob(token)], reward=reward)
            for n, (token, reward) in enumerate([(up, 1.0), (down, -1.0)] * 2)
        ]
        learner.step(batch, training_version=step)
        history.append((logprob(up), logprob(down)))
    ups, downs = zip(*history, strict=True)
    assert sorted(ups) == list(ups)
    assert sorted(downs, reverse=True) == list(downs)
    assert ups[-1] - ups[0] > 0.5
    assert downs[-1] - downs[0] < -0.5


def poison(learner, number, *, only_first=False):
    """Every gradient of one parameter becomes `number`; with `only_first`, in the first backward pass alone."""
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient if only_first and len(calls) > 1 else torch.full_like(gradient, number)

    return learner.policy.value_head.linear.weight.register_hook(hook)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_step_without_any_finite_gradient_changes_nothing_and_says_so(folder, number):
    learner = new_learner(folder, epochs=2, minibatches=2)
    batch = toy_batch(learner.policy)
    poison(learner, number)
    before = tensors_of(learner)
    with pytest.raises(ArithmeticError, match="step 4: no minibatch had a finite"):
        learner.step(batch, training_version=3)
    for name, tensor in learner.policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert learner.optimizer.state_dict()["state"] == {}


def test_fewer_responses_than_minibatches_without_a_finite_gradient_say_so_too(folder):
    learner = new_learner(folder, batch_size=2, minibatches=2)  # the other response was quarantined
    poison(learner, math.nan)
    with pytest.raises(ArithmeticError):
        learner.step(toy_batch(learner.policy)[:1], training_version=0)


def test_a_minibatch_without_a_finite_gradient_is_left_out_and_counted(folder):
    # The only difference between the two learners is a first minibatch that must leave no trace.
    skips, reference = (new_learner(folder, epochs=epochs, micro_batch_tokens=4096) for epochs in (2, 1))
    batch = toy_batch(skips.policy)
    hook = poison(skips, math.nan, only_first=True)
    metrics = skips.step(batch, training_version=0)
    hook.remove()
    assert metrics["skipped_minibatches"] == 1
    assert {name: value for name, value in metrics.items() if not math.isfinite(value)} == {}
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-6)  # the second epoch is the first to train
    reference.step(batch, training_version=0)
    for name, tensor in skips.policy.state_dict().items():
        assert torch.equal(tensor, reference.policy.state_dict()[name]), name


# Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2), beta <- beta (1 + e n / horizon).
# beta 0.1, target 6, horizon 10000 as published, n = 512 responses.
@pytest.mark.parametrize(
    ("kl", "expected"),
    [(12.0, 0.101024), (6.6, 0.100512), (6.0, 0.1), (5.4, 0.099488), (0.0, 0.098976), (-50.0, 0.098976)],
)
def test_the_kl_coefficient_adapts_as_published(folder, kl, expected):
    learner = new_learner(folder, kl_coef=0.1, kl_target=6.0, kl_horizon=10_000)
    learner._adapt_kl(kl, 512)
    assert learner.kl_coef == pytest.approx(expected, rel=1e-12)


def test_the_kl_coefficient_stays_without_a_target(folder):
    learner = new_learner(folder, kl_coef=0.1)
    assert learner.step(toy_batch(learner.policy), training_version=0)["kl_coef"] == 0.1


def test_a_step_adapts_the_kl_coefficient_to_the_kl_of_a_response(folder):
    learner = new_learner(folder, kl_coef=0.1, kl_target=10.0, kl_horizon=40)
    batch = toy_batch(learner.policy)
    with torch.no_grad():
        references = [alone(learner.policy, prompt, response)[0] - 2.0 for prompt, response, _, _ in TOY]
    batch = [replace(s, reference_logprobs=ref.tolist()) for s, ref in zip(batch, references, strict=True)]
    metrics = learner.step(batch, training_version=0)
    # 2 nats a token, 15 tokens, 4 responses: 7.5 a response, error clipped at -0.2, 4 of 40 responses.
    assert metrics["kl_to_reference"] == pytest.approx(7.5, abs=1e-4)
    assert metrics["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 4 / 40))
    assert learner.kl_coef == metrics["kl_coef"]


def test_learning_rates_warm_up(folder):
    learner = new_learner(folder, learning_rate=1e-3, value_learning_rate=1e-2, warmup_steps=3)
    rates = []
    for version in range(5):
        learner.step(toy_batch(learner.policy), training_version=version)
        rates.append([group["lr"] for group in learner.optimizer.param_groups])
    assert rates == [pytest.approx([1e-3 * share, 1e-2 * share]) for share in (0.25, 0.5, 0.75, 1.0, 1.0)]


@pytest.mark.parametrize("tied", [True, False])
def test_a_restored_learner_takes_the_same_next_step_to_the_last_bit(tmp_path, tied):
    settings = {"epochs": 2, "minibatches": 2, "warmup_steps": 5, "kl_target": 0.5, "kl_horizon": 10}
    folder = build_tiny_model(tmp_path / "one", tied=tied, hidden_size=64)
    other = build_tiny_model(tmp_path / "other", tied=tied, hidden_size=64, seed=9)
    learner = new_learner(folder, **settings)
    for version in range(2):
        learner.step(toy_batch(learner.policy, seed=version), training_version=version)
    file = io.BytesIO()
    torch.save(learner.state(), file)
    file.seek(0)
    restored = new_learner(other, value_head=False, **settings)
    restored.restore(torch.load(file, weights_only=True))

    batch = toy_batch(learner.policy, seed=2)
    assert restored.step(batch, training_version=2) == learner.step(batch, training_version=2)
    for name, tensor in learner.policy.state_dict().items():
        assert torch.equal(restored.policy.state_dict()[name], tensor), name
    states = [each.optimizer.state_dict()["state"] for each in (learner, restored)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in state.items()), index
    assert restored.kl_coef == learner.kl_coef != learner.config.kl_coef


def test_the_order_of_minibatches_follows_from_seed_and_version(folder):
    first, same, other_seed = (new_learner(folder, minibatches=4, seed=seed) for seed in (0, 0, 1))
    batch = toy_batch(first.policy)
    for learner in (first, same, other_seed):
        learner.step(batch, training_version=0)
    weights = [learner.policy.model.get_input_embeddings().weight for learner in (first, same, other_seed)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("tied", [True, False])
def test_weights_hold_each_tensor_once_under_its_checkpoint_name(tmp_path, tied):
    learner = new_learner(build_tiny_model(tmp_path, tied=tied, hidden_size=64))
    weights = learner.weights()
    assert "model.embed_tokens.weight" in weights
    assert ("lm_head.weight" in weights) is not tied
    assert not any("value_head" in name for name in weights)
    memory = [tensor.data_ptr() for tensor in weights.values()]
    assert len(set(memory)) == len(memory)
    assert len(weights) == len({id(parameter) for parameter in learner.policy.model.parameters()})


def test_tied_embeddings_are_still_tied_after_restoring(folder):
    learner = new_learner(folder)
    learner.restore(learner.state())
    model = learner.policy.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_the_state_of_another_model_is_refused(folder, change):
    learner = new_learner(folder)
    state = learner.state()
    if change == "missing":
        del state["policy"]["model.norm.weight"]
    else:
        state["policy"]["model.extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"another model.*model\.(norm|extra)\.weight"):
        learner.restore(state)


def test_a_bad_record_is_refused_by_trajectory_and_nothing_is_trained(folder):
    learner = new_learner(folder)
    batch = toy_batch(learner.policy)
    before = tensors_of(learner)
    with pytest.raises(ValueError, match="trajectory t2: reward is not finite"):
        learner.step([*batch[:2], replace(batch[2], reward=math.nan), batch[3]], training_version=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.policy.state_dict().items())


def test_a_model_that_changes_its_logits_afterwards_is_refused(folder):
    model = copy.deepcopy(new_learner(folder).policy.model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        ActorCritic(model)
