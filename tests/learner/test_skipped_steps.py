"""Steps whose gradient is not finite leave no trace but a count; and the learning rate of each step."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from contracts.algorithm import TrainingConfig
from learner.ppo import learning_rate_factor
from learner.ranks import whole
from tests.learner.by_hand import new_learner, plain_copy, tensors_of, toy_batch
from tests.tiny import build_tiny_model

ALGORITHMS = ["ppo", "grpo", "dr_grpo", "rloo", "reinforce++"]


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
def batch(folder):
    return toy_batch(plain_copy(folder, new_learner(folder)))


def assert_finite(metrics):
    assert {name: value for name, value in metrics.items() if not math.isfinite(value)} == {}


def poison(learner, number, *, only_first=False):
    """Every gradient below the last layer is multiplied by `number`; with `only_first`, in the first pass alone."""
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient if only_first and len(calls) > 1 else gradient * number

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(spoil)

    return learner.policy.policy.model.norm.register_forward_hook(hook)


def moments_of(learner):
    return [
        whole(values[name]).clone()
        for values in learner.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq", "step")
    ]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_step_without_any_finite_gradient_changes_nothing_and_is_counted(folder, batch, name, number):
    learner = new_learner(folder, {"name": name}, epochs=2, minibatches=2, max_skipped_steps=2)
    poison(learner, number)
    before = tensors_of(learner)
    moments = moments_of(learner)
    metrics = learner.step(batch, training_version=0)
    assert_finite(metrics)
    assert metrics["skipped_minibatches"] == 4
    assert learner.skipped_in_row == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(learner).items())
    assert all(torch.equal(*pair) for pair in zip(moments, moments_of(learner), strict=True))


def test_after_so_many_steps_in_a_row_the_run_stops(folder, batch):
    learner = new_learner(folder, max_skipped_steps=3)
    poison(learner, math.nan)
    for version in (4, 5):
        learner.step(batch, training_version=version)
    with pytest.raises(ArithmeticError, match=r"step 7: .* 3\. step in a row \(training.max_skipped_steps\)"):
        learner.step(batch, training_version=6)


def test_a_good_step_in_between_starts_the_count_again(folder, batch):
    learner = new_learner(folder, max_skipped_steps=2)
    for version in range(3):
        hook = poison(learner, math.nan)
        learner.step(batch, training_version=2 * version)
        assert learner.skipped_in_row == 1
        hook.remove()
        learner.step(batch, training_version=2 * version + 1)
        assert learner.skipped_in_row == 0


def test_a_single_finite_minibatch_is_a_good_step(folder, batch):
    learner = new_learner(folder, epochs=2, max_skipped_steps=1)
    poison(learner, math.nan, only_first=True)
    metrics = learner.step(batch, training_version=0)
    assert_finite(metrics)
    assert (metrics["skipped_minibatches"], learner.skipped_in_row) == (1, 0)


def test_fewer_groups_than_minibatches_without_a_finite_gradient_stop_too(folder, batch):
    learner = new_learner(folder, minibatches=4, max_skipped_steps=1)  # the other groups were dropped
    poison(learner, math.nan)
    with pytest.raises(ArithmeticError):
        learner.step(batch[:2], training_version=0)


def test_a_minibatch_without_a_finite_gradient_leaves_no_trace(folder, batch):
    # The only difference between the two learners is a first minibatch that must not count. One group, so that both
    # epochs have the rows in one order.
    group = [sample for sample in batch if sample.rollout.group_id == "a"]
    skips, reference = (new_learner(folder, epochs=epochs) for epochs in (2, 1))
    hook = poison(skips, math.nan, only_first=True)
    metrics = skips.step(group, training_version=0)
    hook.remove()
    expected = reference.step(group, training_version=0)
    assert metrics["skipped_minibatches"] == 1
    assert metrics["ratio_max"] == 1  # the second epoch is the first to train
    assert metrics == expected | {"skipped_minibatches": 1.0}  # means are over the minibatches that trained
    assert all(torch.equal(tensor, tensors_of(reference)[name]) for name, tensor in tensors_of(skips).items())


@pytest.mark.parametrize("reward", [1e30, 3e38])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_absurd_score_leaves_metrics_and_parameters_finite(folder, batch, name, reward):
    # Finite in float32, its square is not: that minibatch is left out, another one trains.
    learner = new_learner(folder, {"name": name}, minibatches=4)
    before = tensors_of(learner)
    metrics = learner.step([replace(batch[0], reward=reward), *batch[1:]], training_version=0)
    assert_finite(metrics)
    if name in ("grpo", "reinforce++"):  # divided by the deviation: nothing is large
        assert metrics["skipped_minibatches"] == 0
    else:
        assert metrics["skipped_minibatches"] == 1
    after = tensors_of(learner)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("settings", [{"normalise_values": True}, {"normalise_rewards": True}])
def test_an_absurd_score_leaves_running_statistics_finite(folder, batch, settings):
    learner = new_learner(folder, settings)
    for version in range(2):
        assert_finite(learner.step([replace(batch[0], reward=3e38), *batch[1:]], training_version=version))
    assert all(math.isfinite(number) for state in ("reward", "value") for number in _moments(learner, state))


def _moments(learner, name):
    return learner.counters()[f"{name}_moments"].values()


def test_weights_that_give_nan_are_a_skipped_step_where_the_loss_sees_them_first(folder, batch):
    learner = new_learner(folder, {"name": "grpo"}, max_skipped_steps=2)
    with torch.no_grad():
        learner.policy.policy.model.norm.weight.to_local()[0] = math.nan
    metrics = learner.step(batch, training_version=0)
    assert_finite(metrics)
    assert metrics["skipped_minibatches"] == 1
    with pytest.raises(ArithmeticError):
        learner.step(batch, training_version=1)


# kl_target: a coefficient that is NaN once stays so.
@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"normalise_values": True},
        {"normalise_rewards": True, "kl_target": 1.0},
        {"name": "grpo", "kl_target": 1.0},
        {"name": "dr_grpo", "behavior_weight_level": "sequence"},
        {"name": "rloo"},
        {"name": "reinforce++"},
    ],
    ids=str,
)
def test_weights_that_give_nan_are_a_skipped_step(folder, batch, algorithm):
    learner = new_learner(folder, algorithm, max_skipped_steps=2)
    with torch.no_grad():
        learner.policy.policy.model.norm.weight.to_local()[0] = math.nan
    before = learner.counters()
    metrics = learner.step(batch, training_version=0)
    assert_finite(metrics)
    assert metrics["skipped_minibatches"] == 1
    counted = {"step_count": 1, "skipped_in_row": 1, "reward_moments": learner.counters()["reward_moments"]}
    assert learner.counters() == before | counted
    with pytest.raises(ArithmeticError):
        learner.step(batch, training_version=1)


# --- learning rates --------------------------------------------------------------------------------------------------


# Warm-up of 3 steps to a constant; or down to 0 at step 8, five steps later; cosine: (1 + cos(pi k / 5)) / 2.
COSINE = [1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915, 0.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2, 0, 0]),
        ("cosine", [0.25, 0.5, 0.75, *COSINE, 0]),
    ],
)
def test_learning_rate_factors(schedule, expected):
    training = TrainingConfig(schedule=schedule, warmup_steps=3)
    factors = [learning_rate_factor(step, training, total_steps=8) for step in range(10)]
    assert factors == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_factors_without_warm_up_or_with_nothing_else(schedule):
    assert learning_rate_factor(0, TrainingConfig(schedule=schedule), total_steps=1) == 1
    all_warm_up = TrainingConfig(schedule=schedule, warmup_steps=4)
    assert [learning_rate_factor(step, all_warm_up, total_steps=4) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]


def test_each_step_uses_its_learning_rates(folder, batch):
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-2,
        "warmup_steps": 3,
        "schedule": "linear",
    }
    learner = new_learner(folder, **settings)  # of ten steps
    rates = []
    for version in range(5):
        learner.step(batch, training_version=version)
        rates.append([group["lr"] for group in learner.optimizer.param_groups])
    assert rates == [pytest.approx([1e-3 * share, 1e-2 * share]) for share in (0.25, 0.5, 0.75, 1.0, 6 / 7)]


def test_a_separate_critic_learns_at_the_critics_rate(folder):
    learner = new_learner(folder, {"critic": "separate"}, learning_rate=1e-3, value_learning_rate=1e-2)
    rate_of = {id(p): group["base_lr"] for group in learner.optimizer.param_groups for p in group["params"]}
    for name, parameter in learner.policy.named_parameters():
        assert rate_of[id(parameter)] == (1e-3 if name.startswith("policy.") else 1e-2), name


def test_adam_moves_each_parameter_by_its_rate_in_the_first_step(folder, batch):
    """Kingma & Ba 2015, algorithm 1: in the first step m / sqrt(v) is the gradient's sign."""
    learner = new_learner(folder, learning_rate=1e-3, value_learning_rate=1e-2, warmup_steps=1)
    before = tensors_of(learner)
    learner.step(batch, training_version=0)
    for name, rate in (("policy.model.norm.weight", 0.5e-3), ("value_head.linear.weight", 0.5e-2)):
        moved = (tensors_of(learner)[name] - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)
