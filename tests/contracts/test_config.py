"""Configuration files and overrides: what is accepted, and one helpful line for what is not."""

import pytest
import yaml

from contracts.config import Config, ConfigError
from contracts.loading import dump, load, validate

MINIMAL = {
    "output_dir": "runs/x",
    "model": {"path": "some/model"},
    "prompts": {"path": "prompts.jsonl"},
    "rewards": [{"name": "length", "function": "my.rewards:length"}],
}


def load_with(tmp_path, changes, overrides=()):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, **changes}), encoding="utf-8")
    return load(file, overrides)


def message_of(tmp_path, changes, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_with(tmp_path, changes, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_minimal_file_gets_every_default(tmp_path):
    config = load_with(tmp_path, {})
    assert config.training.learning_rate == 1e-6
    assert config.queue_samples == config.training.batch_size
    assert config.max_prompt_tokens == config.model.max_context_tokens - config.sampling.max_response_tokens
    assert not config.resume


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"stpes": 3}, ["stpes: unknown key", "did you mean steps?"]),
        ({"training": {"lerning_rate": 1}}, ["training.lerning_rate: unknown key", "did you mean learning_rate?"]),
        (
            {"training": {"zzzz": 1}},
            ["training.zzzz: unknown key", "known here: activation_checkpointing, "],
        ),
        (
            {"rewards": [{"name": "a", "function": "a:b", "wieght": 2}]},
            ["rewards.0.wieght: unknown key", "did you mean weight?"],
        ),
        (
            {"preferences": {"simulate": {"gold": "a:b", "voters": {"me": {"count": 9, "acuracy": 1}}}}},
            ["preferences.simulate.voters.me.acuracy: unknown key", "did you mean accuracy?"],
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path, changes, parts):
    message = message_of(tmp_path, changes)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"steps": "many"}, "steps: input should be a valid integer"),
        ({"steps": True}, "steps: true is not allowed here"),
        ({"training": {"learning_rate": True}}, "training.learning_rate: true is not allowed here"),
        ({"resume": "perhaps"}, "resume: input should be a valid boolean"),
        ({"training": 3}, "training: a section with keys of its own is expected, got 3"),
        ({"rewards": {"a": 1}}, "rewards: input should be a valid tuple"),
        ({"prompts": {"path": "p", "system": 5}}, "prompts.system: input should be a valid string, got 5"),
        ({"model": {"path": ["x" * 500]}}, "model.path: input should be a valid string, got ['xxx"),
    ],
)
def test_a_wrong_type_is_named(tmp_path, changes, start):
    message = message_of(tmp_path, changes)
    assert message.removeprefix(f"{tmp_path / 'config.yaml'}: ").startswith(start), message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"steps": 0}, "steps: "),
        ({"seed": -1}, "seed: "),
        ({"sampling": {"temperature": 0}}, "sampling.temperature: "),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate: input should be a finite number"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: "),
        ({"algorithm": {"gamma": 1.5}}, "algorithm.gamma: "),
        ({"algorithm": {"name": "rloo", "truncation": "bootstrap"}}, "truncation needs a critic, and rloo has none"),
        ({"algorithm": {"kl_target": 3.0, "kl_coef": 0}}, "kl_coef must start above 0"),
        ({"algorithm": {"kl_estimator": "k1"}}, "algorithm.kl_estimator: "),
        ({"algorithm": {"name": "grpo"}}, "training.samples_per_prompt is 1, but grpo compares responses"),
        ({"model": {"path": "m", "critic_path": "c"}}, "only algorithm.critic `separate` of ppo loads it"),
        ({"training": {"batch_size": 10, "samples_per_prompt": 4}}, "training: batch_size 10 is not divisible"),
        ({"training": {"batch_size": 9}}, "not divisible by minibatches 2"),
        ({"training": {"micro_batch_tokens": 100}}, "training.micro_batch_tokens 100 is less than one sequence"),
        ({"sampling": {"max_response_tokens": 1024}}, "leaves no room for a prompt"),
        ({"streaming": {"queue_samples": 2}}, "streaming.queue_samples 2 is less than training.batch_size 64"),
        (
            {"deterministic": True, "streaming": {"max_lag_steps": 1}},
            "deterministic: true needs streaming.max_lag_steps 0",
        ),
        (
            {"deterministic": True, "rollout": {"autoscale": {"max_workers": 4}}},
            "deterministic: true needs a fixed number of workers, not rollout.autoscale",
        ),
        (
            {"rollout": {"num_workers": 5, "autoscale": {"min_workers": 2, "max_workers": 4}}},
            "rollout: num_workers 5 is not within autoscale.min_workers 2 and autoscale.max_workers 4",
        ),
        (
            {"rollout": {"num_workers": 2, "autoscale": {"min_workers": 5, "max_workers": 4}}},
            "rollout.autoscale: min_workers 5 is more than max_workers 4",
        ),
        ({"rollout": {"autoscale": {"min_workers": 1}}}, "rollout.autoscale.max_workers: "),
        (
            {"rollout": {"num_gpus": 1, "tensor_parallel_size": 4}},
            "rollout: num_gpus is 1 and tensor_parallel_size 4: an engine uses as many GPUs as it has processes",
        ),
        (
            {"serving": {"replicas": {"num_gpus": 2}}},
            "serving.replicas: num_gpus is 2 and tensor_parallel_size 1: an engine uses as many GPUs as it has",
        ),
        ({"rollout": {"num_gpus": 0.5, "tensor_parallel_size": 2}}, "rollout: num_gpus is 0.5 and tensor_parallel_"),
        (
            {"deterministic": True, "model": {"path": "m", "dtype": "float32"}},
            "deterministic: true needs model.dtype bf",
        ),
        ({"rewards": []}, "rewards: "),
        ({"rewards": [{"name": "a"}]}, "rewards.0: give exactly one of model and function"),
        ({"rewards": [{"name": "a", "model": "preferences"}]}, "there is no preferences section"),
        ({"rewards": [{"name": "a", "function": "a:b"}] * 2}, "the name 'a' is used twice"),
        ({"rewards": [{"name": "a", "function": "a.b"}]}, "rewards.0.function: "),
        ({"preferences": {}}, "preferences: give exactly one of path, simulate and people"),
        (
            {"preferences": {"simulate": {"gold": "a:b", "voters": {"x": {"count": 2, "accuracy": 1}}}}},
            "votes_per_pair is 5 but the panel has only 2 voters",
        ),
    ],
)
def test_an_impossible_value_is_refused(tmp_path, changes, part):
    assert part in message_of(tmp_path, changes)


def test_a_missing_key_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != "model"}))
    with pytest.raises(ConfigError, match="model: required, but missing"):
        load(file)


def test_overrides_reach_nested_keys_and_read_numbers(tmp_path):
    overrides = [
        "training.learning_rate=1e-6",
        "algorithm.kl_target=6",
        "resume=true",
        "steps=1e2",
        "prompts.system='5'",
    ]
    config = load_with(tmp_path, {"training": {"learning_rate": 3e-5, "epochs": 7}}, overrides)
    assert (config.training.learning_rate, config.training.epochs, config.algorithm.kl_target) == (1e-6, 7, 6.0)
    assert config.resume is True
    assert config.steps == 100
    assert config.prompts.system == "5"


def test_overrides_make_sections_that_the_file_does_not_have(tmp_path):
    overrides = ["preferences.simulate.gold=a:b", "training.epochs=3", "ray.num_cpus=null"]
    config = load_with(tmp_path, {"training": None}, overrides)
    assert config.preferences is not None
    assert config.preferences.simulate is not None
    assert config.preferences.simulate.gold == "a:b"
    assert config.training.epochs == 3
    assert config.ray.num_cpus is None


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("steps", "write key=value"),
        ("=3", "write key=value"),
        ("training..epochs=3", "write key=value"),
        ("steps=[1", "not valid YAML"),
        ("rewards.0.weight=2", "rewards is a list, not a section"),
        ("output_dir.x=2", "output_dir is a str, not a section"),
        ("training.epcohs=2", "did you mean epochs?"),
    ],
)
def test_a_bad_override_is_named(tmp_path, override, part):
    assert part in message_of(tmp_path, {}, [override])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [1", "line 1 not valid YAML"),
        (b"\xff", "not UTF-8"),
        (b"", "this file holds nothing"),
        (b"- a", "this file holds a list"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, part):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_dump_and_load_give_the_same_configuration(tmp_path):
    config = load_with(
        tmp_path,
        {
            "preferences": {"simulate": {"gold": "a:b"}},
            "evaluation": {"judges": [{"name": "judge", "function": "a:b", "weight": -0.5}]},
            "prompts": {"path": "dir with space/ä.jsonl", "system": "line one\nline two: 1e-6"},
        },
        ["training.learning_rate=1.2345678901234567e-07", "streaming.max_lag_steps=2"],
    )
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump(config), encoding="utf-8")
    assert load(saved) == config
    assert yaml.safe_load(dump(config))["checkpoint"] == {"every_steps": 20, "keep": 2}  # defaults are written out


def test_a_configuration_cannot_be_changed():
    config = validate(MINIMAL, source="test")
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3
