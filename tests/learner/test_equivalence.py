"""How a batch is laid out and cut changes nothing: packed, shared, padded, in any micro-batches, in one pass or two.

Gradients of all parameters, log-probabilities, values and metrics, in fp32. Two ranks: tests/learner/test_group.py.
"""

from typing import Any

import pytest
import torch

from learner import ppo
from learner.actor_critic import ActorCritic, Scores
from learner.experience import to_experience
from learner.ppo import PPOLearner
from models import packed_attention, projection
from tests.learner.by_hand import (
    LONGEST,
    TOY,
    PlainActorCritic,
    alone,
    assert_same_gradients,
    gradients_of,
    new_learner,
    plain_copy,
    record_updates,
    tensors_of,
    toy_batch,
)
from tests.tiny import build_tiny_model

PACKINGS = ["shared_prompts", "sequences", "padded"]
# A sequence at a time, a few, everything at once.
BUDGETS = [LONGEST, 20, 4096]
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"entropy_coef": 0.1},
    "ppo separate": {"critic": "separate"},
    "ppo normalised": {"normalise_values": True, "normalise_rewards": True, "kl_in": "loss", "kl_coef": 0.2},
    "ppo sequence": {"loss_aggregation": "sequence", "truncation": "bootstrap"},
    "ppo constant": {"loss_aggregation": "constant", "behavior_weight_level": "sequence"},
    "grpo": {"name": "grpo", "kl_coef": 0.2, "entropy_coef": 0.1},
    "grpo token": {"name": "grpo", "loss_aggregation": "token", "kl_estimator": "k2"},
    "grpo constant": {"name": "grpo", "loss_aggregation": "constant", "kl_in": "reward"},
    "dr_grpo": {"name": "dr_grpo", "kl_coef": 0.2},
    "rloo": {"name": "rloo", "kl_coef": 0.2, "behavior_weight_level": "sequence"},
    "rloo sequence": {"name": "rloo", "loss_aggregation": "sequence", "entropy_coef": 0.1},
    "reinforce++": {"name": "reinforce++", "kl_coef": 0.2},
    "reinforce++ constant": {"name": "reinforce++", "loss_aggregation": "constant", "entropy_coef": 0.1},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["tied", "untied"])
def any_folder(request, tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), tied=request.param == "tied", hidden_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), tied=True, hidden_size=64)


@pytest.fixture(scope="module")
def batch(folder):
    return toy_batch(plain_copy(folder, new_learner(folder)))


# All trees through the flash kernel, segments by themselves, whole trees.
@pytest.fixture(params=[(0, 0), (0, 10**6), (10**6, 10**6)], ids=["flash", "segments", "trees"])
def dense(request, monkeypatch):
    monkeypatch.setattr(packed_attention, "_DENSE_TREE", request.param[0])
    monkeypatch.setattr(packed_attention, "_DENSE_SEGMENT", request.param[1])


def scores_of(learner: PPOLearner, batch) -> Scores:
    """Log-probs, entropies and values of the whole batch in one forward pass."""
    experience = to_experience(batch, token_budget=4096)
    rows = list(range(len(batch)))
    with torch.no_grad():
        scores = learner.policy(*learner.inputs(experience, ppo.MicroBatch(rows)), temperature=learner.temperature)
    assert isinstance(scores, Scores)
    return scores


def step_of(folder, batch, algorithm: dict[str, Any], **training: Any):
    """Metrics and the gradient of each update of a step; updates are SGD's, so that equal gradients stay so."""
    learner = new_learner(folder, algorithm, **training)
    updates = record_updates(learner, sgd_rate=2e-3)
    metrics = learner.step(batch, training_version=0)
    return metrics, [gradients for _, gradients in updates]


def assert_same_step(found, expected, *, tolerance=2e-5):
    metrics, updates = expected
    assert found[0] == pytest.approx(metrics, rel=1e-4, abs=2e-5)
    assert len(found[1]) == len(updates)
    for gradients, expected_gradients in zip(found[1], updates, strict=True):
        assert_same_gradients(gradients, expected_gradients, tolerance=tolerance)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_gives_what_each_sequence_alone_gives(any_folder, dense, packing, critic):
    learner = new_learner(any_folder, {"critic": critic}, packing=packing)
    plain = plain_copy(any_folder, learner)
    with torch.no_grad():
        each = [alone(plain, row.prompt, row.response) for row in TOY]
    scores = scores_of(learner, toy_batch(plain))
    expected = Scores(
        torch.cat([one.logprobs_T for one in each]),
        torch.cat([one.entropies_T for one in each]),
        torch.cat([one.values_U for one in each]),
    )
    for name, found, by_hand in zip(Scores._fields, scores, expected, strict=True):
        torch.testing.assert_close(found, by_hand, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("packing", ["shared_prompts", "sequences"])
def test_packed_gives_the_losses_and_gradients_of_padded(any_folder, dense, packing, critic):
    batch = toy_batch(plain_copy(any_folder, new_learner(any_folder)))
    settings = {"critic": critic, "entropy_coef": 0.1}
    packed, padded = (step_of(any_folder, batch, settings, packing=each) for each in (packing, "padded"))
    assert_same_step(packed, padded)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_micro_batches_give_the_gradients_of_one_batch(folder, batch, algorithm):
    """Two updates of a minibatch each; the second one's weights come from the first one's gradient."""
    one = step_of(folder, batch, ALGORITHMS[algorithm], micro_batch_tokens=4096, minibatches=2)
    assert len(one[1]) == 2
    for budget in BUDGETS[:-1]:
        cut = step_of(folder, batch, ALGORITHMS[algorithm], micro_batch_tokens=budget, minibatches=2)
        assert_same_step(cut, one, tolerance=5e-5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_budgets_do_cut_the_batch(folder, batch, packing):
    """What the test above relies on: with the smallest budget a sequence goes through the model by itself."""
    counts = []
    for budget in BUDGETS:
        learner = new_learner(folder, {"name": "grpo"}, micro_batch_tokens=budget, packing=packing)
        learner.step(batch, training_version=0)
        counts.append(learner.passes)
    assert counts[-1] == 1 < counts[1] < counts[0]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_packing_and_budget_gives_the_same_step(folder, batch, packing, budget):
    settings = {"entropy_coef": 0.1, "normalise_values": True}
    expected = step_of(folder, batch, settings, epochs=2, packing="padded", micro_batch_tokens=4096)
    found = step_of(folder, batch, settings, epochs=2, packing=packing, micro_batch_tokens=budget)
    assert_same_step(found, expected, tolerance=1e-4)


@pytest.mark.parametrize("chunk_tokens", [1, 5])
def test_the_vocabulary_in_chunks_gives_the_same_step(folder, batch, monkeypatch, chunk_tokens):
    settings = {"name": "grpo", "entropy_coef": 0.1, "kl_coef": 0.2}
    expected = step_of(folder, batch, settings)
    monkeypatch.setattr(projection, "CHUNK_ELEMENTS", chunk_tokens * 320)
    assert_same_step(step_of(folder, batch, settings), expected)


def test_the_order_of_records_changes_nothing(folder, batch):
    # reversed: the groups come in another order, and so do the minibatches; with one there is nothing to cut.
    found, expected = (step_of(folder, each, {"critic": "separate"}) for each in (batch[::-1], batch))
    assert_same_step(found, expected)


# --- the first ratio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("budget", [LONGEST, 4096])
def test_the_first_ratio_is_exactly_one(folder, batch, dense, dtype, packing, budget):
    learner = new_learner(folder, {}, dtype=dtype, packing=packing, micro_batch_tokens=budget)
    metrics = learner.step(batch, training_version=0)
    assert metrics["ratio_max"] == 1
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction"] == 0
    assert metrics["grad_norm"] > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_first_ratio_is_exactly_one_for_every_algorithm(folder, batch, algorithm, dtype):
    learner = new_learner(folder, ALGORITHMS[algorithm], dtype=dtype, micro_batch_tokens=20)
    metrics = learner.step(batch, training_version=0)
    assert (metrics["ratio_max"], metrics["approx_kl"]) == (1, 0)
    # From now on the weights are others, and the proximal policy is the one of the new step.
    metrics = learner.step(batch, training_version=1)
    assert (metrics["ratio_max"], metrics["approx_kl"]) == (1, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_of_fewer_groups_than_minibatches_is_exactly_one(folder, batch, dtype, monkeypatch):
    learner = new_learner(folder, minibatches=4, epochs=2, dtype=dtype, micro_batch_tokens=LONGEST)
    ratios: list[dict[str, Any]] = []
    update = learner._update

    def recorded(*args):
        ratios.append(update(*args))
        return ratios[-1]

    monkeypatch.setattr(learner, "_update", recorded)
    learner.step([sample for sample in batch if sample.rollout.group_id == "a"], training_version=0)
    assert len(ratios) == 2
    assert ratios[0]["ratio_max"] == 1 != ratios[1]["ratio_max"]


def test_later_ratios_are_not_one(folder, batch):
    metrics = new_learner(folder, epochs=2).step(batch, training_version=0)
    assert metrics["ratio_max"] > 1
    assert metrics["approx_kl"] > 0


# --- one pass or two -------------------------------------------------------------------------------------------------


ONE_PASS = ["grpo", "grpo token", "dr_grpo"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ONE_PASS)
def test_one_pass_gives_what_two_give(folder, batch, monkeypatch, algorithm, dtype):
    """One update without a critic: its own forward pass is the proximal one."""
    one = step_of(folder, batch, ALGORITHMS[algorithm], dtype=dtype, micro_batch_tokens=20)
    monkeypatch.setattr(ppo, "needs_predictions", lambda *args, **kwargs: True)
    two = step_of(folder, batch, ALGORITHMS[algorithm], dtype=dtype, micro_batch_tokens=20)
    assert one[0] == pytest.approx(two[0], rel=1e-5, abs=1e-6)
    for name, gradient in one[1][0].items():
        assert torch.equal(gradient, two[1][0][name]), name


@pytest.mark.parametrize(
    ("algorithm", "training", "passes"),
    [
        ({"name": "grpo"}, {}, 1),
        ({"name": "dr_grpo"}, {}, 1),
        ({"name": "rloo", "kl_coef": 0.0}, {}, 1),
        ({"name": "rloo"}, {}, 2),  # KL in the reward: the advantages need the log-probabilities
        ({"name": "grpo", "behavior_weight_level": "sequence"}, {}, 2),
        ({"name": "grpo"}, {"epochs": 2}, 3),
        ({"name": "grpo"}, {"minibatches": 2}, 4),
        ({}, {}, 2),
    ],
)
def test_a_step_scores_its_batch_only_where_it_must(folder, batch, algorithm, training, passes):
    learner = new_learner(folder, algorithm, **training)
    learner.step(batch, training_version=0)
    assert learner.passes == passes


def test_the_plain_model_has_the_learners_parameters(any_folder):
    """What all comparisons rest on: the same names and numbers, in a model that shares no code with it."""
    learner = new_learner(any_folder, {"critic": "separate"})
    plain = plain_copy(any_folder, learner)
    assert isinstance(plain, PlainActorCritic)
    assert not isinstance(plain, ActorCritic)
    assert plain.policy.config._attn_implementation == "eager"
    assert learner.policy.policy.config._attn_implementation == packed_attention.PACKED_ATTENTION
    assert tensors_of(learner).keys() == plain.state_dict().keys()
    torch.stack([parameter.sum() for parameter in plain.parameters()]).sum().backward()
    assert len(gradients_of(plain)) == len(list(learner.policy.named_parameters()))
