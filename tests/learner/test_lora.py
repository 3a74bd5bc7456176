"""LoRA in the learner: what is trained, gradients against those of the plain model, checkpoints, two ranks."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from contracts.algorithm import AlgorithmConfig, LoraConfig, TrainingConfig
from contracts.records import ScoredRollout
from learner.ppo import PPOLearner
from learner.rank_state import load_state, save_policy, save_policy_adapter, save_state
from learner.ranks import whole
from models.adapters import adapter_shapes, layer_kinds, skeleton
from models.weight_stream import read_tensors
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.learner.test_group import group, settings, trained
from tests.rollouts import scored_rollout
from tests.tiny import build_tiny_model

LORA = LoraConfig(rank=4, alpha=12)
KINDS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
# What may differ from one run of tests to the next: every objective with a trunk of its own is here once.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ppo": ({"name": "ppo"}, {}),
    "ppo, critic apart": ({"name": "ppo", "critic": "separate"}, {"packing": "sequences"}),
    "grpo, bf16, recomputed": ({"name": "grpo"}, {"dtype": "bfloat16", "activation_checkpointing": True}),
    "rloo, padded": ({"name": "rloo"}, {"packing": "padded"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("lora") / "tiny", tied=True, hidden_size=64)


def batch(seed: int) -> list[ScoredRollout]:
    source = random.Random(seed)
    samples = []
    for number in range(8):
        length = source.randrange(1, 8)
        samples.append(
            scored_rollout(
                f"t{number}",
                group_id=f"g{number // 2}",
                prompt=[5, 6, 7 + number // 2],
                response=[source.randrange(3, 300) for _ in range(length)],
                behavior=[-5.8] * length,
                reference=[-5.8] * length,
                reward=source.gauss(0, 1),
            )
        )
    return samples


def new_learner(folder: Path, algorithm: dict[str, Any], training: dict[str, Any]) -> PPOLearner:
    defaults: dict[str, Any] = {
        "batch_size": 8,
        "samples_per_prompt": 2,
        "epochs": 2,
        "minibatches": 2,
        "micro_batch_tokens": 24,
        "learning_rate": 1e-2,
        "value_learning_rate": 1e-2,
        "dtype": "float32",
        "lora": LORA,
    }
    return PPOLearner(
        str(folder),
        AlgorithmConfig.model_validate(algorithm),
        TrainingConfig.model_validate(defaults | training),
        temperature=0.8,
        max_response_tokens=8,
        total_steps=10,
        seed=1,
    )


def tensors(learner: PPOLearner) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in learner.policy.state_dict().items()}


def parameters(learner: PPOLearner) -> dict[str, Tensor]:
    """By the names of a state dict, which know nothing of activation checkpointing."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in learner.policy.named_parameters()}


def response_logprobs(model: Any, sample: ScoredRollout) -> Tensor:
    prompt, response = sample.rollout.prompt_tokens, sample.rollout.response_tokens
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return logits_TV.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("run_name", RUNS)
def test_only_adapters_and_the_value_head_are_trained(folder: Path, run_name: str) -> None:
    learner = new_learner(folder, *RUNS[run_name])
    before = tensors(learner)
    for version in range(2):
        learner.step(batch(version), training_version=version)
    after = tensors(learner)
    trained_names = {name for name in before if ".lora_" in name or name.startswith("value_head.")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained_names
    # The frozen layers are those of the model's file, in the dtype that they compute in.
    dtype = getattr(torch, learner.training.dtype)
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, last = name.rpartition(".")
        found = after.get(f"policy.{layer}.base_layer.{last}", after.get(f"policy.{name}"))
        assert found is not None
        assert torch.equal(found, tensor.to(dtype)), name
    optimized = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for name, p in parameters(learner).items() if name in trained_names}
    assert all(p.dtype == torch.float32 for group in learner.optimizer.param_groups for p in group["params"])


def test_policy_and_critic_have_adapters_of_their_own(folder: Path) -> None:
    learner = new_learner(folder, *RUNS["ppo, critic apart"])
    again = new_learner(folder, *RUNS["ppo, critic apart"])
    state = tensors(learner)
    ours = {name.partition("layers.")[2] for name in state if name.startswith("policy.") and ".lora_" in name}
    critics = {name.partition("layers.")[2] for name in state if name.startswith("critic_trunk.") and ".lora_" in name}
    assert ours == critics
    assert len(ours) == 2 * 2 * len(KINDS)
    for name in ours:
        policy, critic = state[f"policy.model.layers.{name}"], state[f"critic_trunk.layers.{name}"]
        if ".lora_B." in name:  # adapters start without an effect
            assert not policy.any()
            assert not critic.any()
        else:
            assert not torch.equal(policy, critic)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors(again).items())


def test_before_training_weights_are_the_models(folder: Path) -> None:
    learner = new_learner(folder, *RUNS["grpo, bf16, recomputed"])
    expected = load_file(folder / "model.safetensors")
    found = learner.weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].bfloat16(), tensor) for name, tensor in expected.items())
    assert learner.dense_bytes(torch.bfloat16) == sum(2 * tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize("run_name", ["ppo", "rloo, padded"])
def test_gradients_are_those_of_the_merged_model_by_the_chain_rule(
    folder: Path, tmp_path: Path, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W' = W + s B A: dL/dB = s dL/dW' Aᵀ and dL/dA = s Bᵀ dL/dW', with dL/dW' from a learner of all weights."""
    algorithm, training = RUNS[run_name]
    training = training | {"max_grad_norm": 1e9, "epochs": 1, "minibatches": 1}
    adapted = new_learner(folder, algorithm, training)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.policy.named_parameters():
            if ".lora_B." in name or name.startswith("value_head."):
                assert isinstance(parameter, DTensor)
                local = parameter.to_local()  # one rank: all of it
                local.copy_(torch.randn(local.shape, generator=generator) * 0.1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(adapted.weights(), strict=False)
    model.save_pretrained(tmp_path / "merged")
    plain = new_learner(tmp_path / "merged", algorithm, training | {"lora": None})
    with torch.no_grad():
        for name, parameter in plain.policy.named_parameters():
            if name.startswith("value_head."):
                parameter.copy_(adapted.policy.get_parameter(name))
    gradients, expected = gradients_of(adapted, monkeypatch), gradients_of(plain, monkeypatch)
    state = tensors(adapted)
    scale = LORA.alpha / LORA.rank
    checked = 0
    for name, down_AH in state.items():
        if ".lora_A." not in name:
            continue
        layer = name.removesuffix(".lora_A.default.weight")
        up_OA, slope_OH = state[f"{layer}.lora_B.default.weight"], expected[f"{layer}.weight"]
        for found, wanted in (
            (gradients[name], scale * up_OA.T @ slope_OH),
            (gradients[f"{layer}.lora_B.default.weight"], scale * slope_OH @ down_AH.T),
        ):
            assert wanted.abs().max() > 0
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name)
        checked += 1
    assert checked == 2 * len(KINDS)


def gradients_of(learner: PPOLearner, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Of one step, caught before the optimizer moves anything."""
    caught: dict[str, Tensor] = {}

    def catch() -> None:
        caught.update(
            {name: whole(p.grad).clone() for name, p in learner.policy.named_parameters() if p.grad is not None}
        )

    with monkeypatch.context() as patch:
        patch.setattr(learner.optimizer, "step", catch)
        learner.step(batch(0), training_version=0)
    return caught


@pytest.mark.parametrize("run_name", ["ppo, critic apart", "grpo, bf16, recomputed"])
def test_a_restored_learner_goes_on_with_the_same_bits(folder: Path, tmp_path: Path, run_name: str) -> None:
    learner = new_learner(folder, *RUNS[run_name])
    for version in range(2):
        learner.step(batch(version), training_version=version)
    save_state(learner, tmp_path)
    restored = new_learner(folder, *RUNS[run_name])
    load_state(restored, tmp_path)
    rows = [each.step(batch(2), training_version=2) for each in (learner, restored)]
    assert rows[0] == rows[1]
    expected, found = tensors(learner), tensors(restored)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_state_holds_nothing_of_the_base(folder: Path, tmp_path: Path) -> None:
    learner = new_learner(folder, *RUNS["ppo, critic apart"])
    learner.step(batch(0), training_version=0)
    save_state(learner, tmp_path)
    saved = dcp.FileSystemReader(tmp_path / "learner").read_metadata().state_dict_metadata
    trained_names = {name for name, p in parameters(learner).items() if p.requires_grad}
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == trained_names
    moments = {name for name in saved if name.startswith("optimizer.state.")}
    assert len(moments) == 3 * len(trained_names)  # two moments and a count


def test_an_adapter_of_another_rank_is_refused(folder: Path, tmp_path: Path) -> None:
    save_state(new_learner(folder, {"name": "grpo"}, {}), tmp_path)
    other = new_learner(folder, {"name": "grpo"}, {"lora": {"rank": 8}})
    with pytest.raises(ValueError, match=r"checkpoint of another model: policy.*lora_A.*has shape \(8, 64\)"):
        load_state(other, tmp_path)


def test_policy_and_policy_adapter_say_the_same(folder: Path, tmp_path: Path) -> None:
    """`policy/` through plain transformers, `policy_adapter/` through PEFT over the base."""
    learner = new_learner(folder, *RUNS["ppo"])
    for version in range(3):
        learner.step(batch(version), training_version=version)
    save_policy(learner, tmp_path / "policy", AutoTokenizer.from_pretrained(folder))
    save_policy_adapter(learner, tmp_path / "policy_adapter", base=str(folder))
    written = {path.name for path in (tmp_path / "policy_adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= written
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = batch(9)
    unchanged = [response_logprobs(base, sample) for sample in samples]
    adapted = PeftModel.from_pretrained(base, tmp_path / "policy_adapter")
    by_adapter = [response_logprobs(adapted, sample) for sample in samples]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    for sample, expected_T, old_T in zip(samples, by_adapter, unchanged, strict=True):
        # policy/ is rounded to bf16: 8 bits on logits of about 4.
        torch.testing.assert_close(response_logprobs(policy, sample), expected_T, rtol=0, atol=0.1)
        assert (expected_T - old_T).abs().max() > 0.3
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "policy" / "model.safetensors").items():
        assert torch.equal(merged[name].bfloat16(), tensor), name


def test_chosen_layers_alone_are_adapted(folder: Path) -> None:
    learner = new_learner(folder, {"name": "grpo"}, {"lora": {"rank": 2, "target_modules": ["v_proj", "q_proj"]}})
    lora = learner.training.lora
    assert lora is not None
    found = {name: tuple(tensor.shape) for name, tensor in learner.adapter_weights().items()}
    assert found == adapter_shapes(skeleton(str(folder)), lora)
    assert {name.split(".")[-3] for name in found} == {"q_proj", "v_proj"}
    learner.step(batch(0), training_version=0)


def test_a_rank_above_a_layers_width_works(folder: Path) -> None:
    learner = new_learner(folder, {"name": "grpo"}, {"lora": {"rank": 100}})
    learner.step(batch(0), training_version=0)
    assert learner.adapter_weights()["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].any()


def test_layers_that_are_not_there_are_named(folder: Path) -> None:
    model = skeleton(str(folder))
    assert layer_kinds(model, None) == KINDS
    for unknown in ("query", "lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match=f"no linear layer is named '{unknown}'; there are: down_proj, gate_proj"):
            layer_kinds(model, ["q_proj", unknown])


@pytest.fixture(scope="module")
def by_ranks(
    ray_session: Processes, tiny_model: Path, run: RunCoroutine, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Any]:
    """Three steps on one rank and on two: metrics, the published update, its adapter, and the checkpoint's folder."""

    async def outcome(ranks: int) -> Any:
        saved = tmp_path_factory.mktemp(f"ranks-{ranks}")
        async with group(ranks, settings(tiny_model, lora=LORA)) as made:
            metrics = await trained(made)
            update, payload = await made.publish(3)
            published = read_tensors(await asyncio.gather(*payload), update=update, sender="the learner")
            await made.save(saved)
            return metrics, update, published, saved

    return {ranks: run(outcome(ranks)) for ranks in (1, 2)}


def test_two_ranks_publish_what_one_publishes(by_ranks: dict[int, Any], tiny_model: Path) -> None:
    (metrics, update, expected, _), (more_metrics, other, found, _) = by_ranks[1], by_ranks[2]
    for row, more in zip(metrics, more_metrics, strict=True):
        for name, value in row.items():
            assert more[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert {name: tuple(t.shape) for name, t in expected.items()} == adapter_shapes(skeleton(str(tiny_model)), LORA)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1 / 128, atol=1e-4, msg=name)
    assert update.is_adapter
    assert other.is_adapter
    assert update.is_keyframe
    assert other.is_keyframe
    adapter_bytes = sum(2 * tensor.numel() for tensor in expected.values())
    assert adapter_bytes <= update.num_bytes == other.num_bytes <= 1.3 * adapter_bytes
    policy = load_file(tiny_model / "model.safetensors")
    assert update.dense_bytes == other.dense_bytes == sum(2 * tensor.numel() for tensor in policy.values())


def test_two_ranks_write_the_adapter_that_they_publish(by_ranks: dict[int, Any]) -> None:
    for _, _, published, saved in by_ranks.values():
        adapter = load_file(saved / "policy_adapter" / "adapter_model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
        assert all(torch.equal(adapter[name].bfloat16(), tensor) for name, tensor in published.items())
