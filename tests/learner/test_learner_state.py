"""The learner's state on disk: the next step is the same to the last bit, and foreign states are refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.ppo import PPOLearner
from learner.rank_state import load_state, save_policy, save_state
from learner.ranks import whole
from tests.learner.by_hand import new_learner, plain_copy, tensors_of, toy_batch
from tests.tiny import build_tiny_model

EVERYTHING: dict[str, Any] = {"kl_target": 0.5, "kl_horizon": 10, "normalise_rewards": True}
STATES: dict[str, dict[str, Any]] = {
    "ppo": EVERYTHING | {"normalise_values": True},
    "ppo separate": {"critic": "separate"},
    "grpo": EVERYTHING | {"name": "grpo"},
    "rloo": {"name": "rloo"},
}
TRAINING: dict[str, Any] = {"epochs": 2, "minibatches": 2, "warmup_steps": 5, "schedule": "linear"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request, tmp_path_factory):
    """A model and another one of the same shapes."""
    return [
        build_tiny_model(tmp_path_factory.mktemp("tiny"), tied=request.param, hidden_size=64, seed=seed)
        for seed in (0, 9)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), tied=True, hidden_size=64)


@pytest.fixture(scope="module")
def batches(folder):
    plain = plain_copy(folder, new_learner(folder))
    return [toy_batch(plain, seed=seed) for seed in range(3)]


def moments_of(learner: PPOLearner):
    state = learner.optimizer.state_dict()["state"]
    return {(index, name): whole(value) for index, values in state.items() for name, value in values.items()}


def assert_same_learner(found: PPOLearner, expected: PPOLearner) -> None:
    for tensors in (tensors_of, moments_of):
        one, other = tensors(found), tensors(expected)
        assert one.keys() == other.keys()
        assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []
    assert found.counters() == expected.counters()


@pytest.mark.parametrize("kind", STATES)
def test_a_restored_learner_takes_the_same_next_step_to_the_last_bit(folders, tmp_path, batches, kind):
    learner = new_learner(folders[0], STATES[kind], **TRAINING)
    for version in range(2):
        learner.step(batches[version], training_version=version)
    save_state(learner, tmp_path)
    restored = new_learner(folders[1], STATES[kind], value_head=False, **TRAINING)
    load_state(restored, tmp_path)
    assert_same_learner(restored, learner)
    assert restored.step(batches[2], training_version=2) == learner.step(batches[2], training_version=2)
    assert_same_learner(restored, learner)
    if "kl_target" in STATES[kind]:
        assert restored.kl_coef == learner.kl_coef != learner.algorithm.kl_coef
        assert restored.reward_moments.count == 3 * 8


@pytest.mark.parametrize("steps", [0, 1])
def test_saving_changes_nothing(folder, tmp_path, batches, steps):
    """Before the first step too, where the optimizer has no moments yet."""
    saved, other = (new_learner(folder, **TRAINING) for _ in range(2))
    for version in range(steps):
        for learner in (saved, other):
            learner.step(batches[version], training_version=version)
    save_state(saved, tmp_path / "state")
    save_policy(saved, tmp_path / "policy", AutoTokenizer.from_pretrained(folder))
    assert_same_learner(saved, other)
    for learner in (saved, other):
        learner.step(batches[2], training_version=steps)
    assert_same_learner(saved, other)


def test_the_state_from_before_the_first_step_is_that_of_a_new_learner(folders, tmp_path, batches):
    learner = new_learner(folders[0], **TRAINING)
    save_state(learner, tmp_path)
    restored = new_learner(folders[1], value_head=False, **TRAINING)
    load_state(restored, tmp_path)
    assert restored.step(batches[0], training_version=0) == learner.step(batches[0], training_version=0)
    assert_same_learner(restored, learner)


def test_a_skipped_first_step_can_be_restored(folder, tmp_path, batches):
    learner, restored = (new_learner(folder, max_skipped_steps=5, max_grad_norm=1.0) for _ in range(2))
    absurd = [replace(sample, reward=1e30 * (number % 3)) for number, sample in enumerate(batches[0])]
    assert learner.step(absurd, training_version=0)["skipped_minibatches"] == 1
    save_state(learner, tmp_path)
    load_state(restored, tmp_path)
    assert_same_learner(restored, learner)
    assert restored.skipped_in_row == 1
    assert restored.step(batches[1], training_version=1) == learner.step(batches[1], training_version=1)


@pytest.mark.parametrize(
    ("saved", "loaded", "refusal"),
    [
        ("grpo", "ppo", "checkpoint of algorithm grpo, this is ppo"),
        ("ppo", "grpo", "checkpoint of algorithm ppo, this is grpo"),
        ("ppo separate", "rloo", "checkpoint of algorithm ppo, this is rloo"),
        ("ppo", "ppo separate", "checkpoint of another model.*critic_trunk"),
        ("ppo separate", "ppo", "checkpoint of another model.*critic_trunk"),
    ],
)
def test_the_state_of_another_algorithm_is_refused(folder, tmp_path, saved, loaded, refusal):
    save_state(new_learner(folder, STATES[saved]), tmp_path)
    learner = new_learner(folder, STATES[loaded])
    before = tensors_of(learner)
    with pytest.raises(ValueError, match=refusal):
        load_state(learner, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(learner).items())


@pytest.mark.parametrize(
    ("change", "name"),
    [({"hidden_size": 128}, "weight has shape"), ({"num_layers": 1}, "layers.1"), ({"num_layers": 3}, "layers.2")],
)
def test_the_state_of_another_model_is_refused(folder, tmp_path, change, name):
    sizes = {"hidden_size": 64, "num_layers": 2} | change
    other = build_tiny_model(tmp_path / "model", tied=True, **sizes)
    save_state(new_learner(other, {"name": "grpo"}), tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint of another model.*{name}"):
        load_state(new_learner(folder, {"name": "grpo"}), tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_saved_policy_loads_with_transformers(folders, tmp_path, batches, checkpointing):
    learner = new_learner(folders[0], activation_checkpointing=checkpointing)
    learner.step(batches[0], training_version=0)
    save_policy(learner, tmp_path / "policy", AutoTokenizer.from_pretrained(folders[0]))
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    original = json.loads((folders[0] / "config.json").read_text())
    same = ("dtype", "architectures", "tie_word_embeddings", "vocab_size", "eos_token_id", "pad_token_id")
    assert {name: config[name] for name in same} == {name: original[name] for name in same}
    assert not any("attn" in name for name in config)

    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert model.dtype == torch.bfloat16
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == original["tie_word_embeddings"]
    started: Any = AutoModelForCausalLM.from_pretrained(folders[0])
    expected = {name[7:]: tensor for name, tensor in tensors_of(learner).items() if name.startswith("policy.")}
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    moved = [name for name, tensor in started.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])]
    assert "model.embed_tokens.weight" in moved
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template


def test_weights_hold_each_tensor_once_under_its_checkpoint_name(folders):
    learner = new_learner(folders[0], {"critic": "separate"})
    weights = learner.weights()
    tied = learner.policy.policy.config.tie_word_embeddings
    assert "model.embed_tokens.weight" in weights
    assert ("lm_head.weight" in weights) is not tied
    assert not any("value_head" in name or "critic" in name for name in weights)
    memory = [tensor.data_ptr() for tensor in weights.values()]
    assert len(set(memory)) == len(memory)
    assert len(weights) == len({id(parameter) for parameter in learner.policy.policy.parameters()})


def test_tied_embeddings_are_still_tied_after_restoring(folder, tmp_path, batches):
    learner = new_learner(folder)
    save_state(learner, tmp_path)
    load_state(learner, tmp_path)
    learner.step(batches[0], training_version=0)
    model = learner.policy.policy
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
