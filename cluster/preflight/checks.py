"""Everything that can be checked before a model loads or a file is written, in the order of its cost.

A run that cannot work ends here, within seconds and with one line. `check` writes nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from actors.prompts import PromptRow, read_rows, split
from cluster.preflight import capacity, model_files
from cluster.preflight.adapters import check_adapters
from cluster.preflight.run_folder import check_output_dir
from cluster.trackers.weights_and_biases import check_wandb
from contracts.config import Config, ConfigError
from contracts.events import first_line
from feedback.store import Refused, Store


@dataclass(frozen=True)
class Preflight:
    """What the checks found and the run goes on with.

    `model_path` is still what the configuration says (`bundled:` names are converted at loading). `resume_step`
    is the newest finished checkpoint, 0 where there is none yet, None for a fresh run.
    """

    train_rows: list[PromptRow]
    eval_rows: list[PromptRow]
    model_path: str
    resume_step: int | None


def check(config: Config) -> Preflight:
    """Check a run before it starts.

    Raises:
        ConfigError: one line that names the field or file and what to do.
    """
    local = config.ray.address is None
    if local:  # elsewhere, the cluster's nodes decide
        check_vllm(on_gpu=config.rollout.num_gpus > 0)
        capacity.check_gpus(config)
    resume_step, checkpoints = check_output_dir(config)
    check_preferences(config)
    policy, reward_models = check_models(config)
    capacity.check_disk(config, policy=policy, checkpoints=checkpoints)
    if local:
        capacity.check_memory(config, policy=policy, reward_models=reward_models)
    train_rows, eval_rows = read_prompts(config)
    if config.logging.wandb is not None:
        check_wandb(config.logging.wandb)
    for field, function in _functions(config):
        check_function(function, field)
    return Preflight(train_rows, eval_rows, config.model.path, resume_step)


def check_vllm(*, on_gpu: bool) -> None:
    """Raises ConfigError where vLLM is not installed, without importing it."""
    if importlib.util.find_spec("vllm") is None:
        wanted, other = ("gpu", "cpu") if on_gpu else ("cpu", "gpu")
        raise ConfigError(
            f"vLLM is not installed: pip install 'headrace[{wanted}]' (or 'headrace[{other}]' for {other.upper()}s)"
        )


def check_models(config: Config) -> tuple[int | None, list[int | None]]:
    """Parameters of the policy and of each reward model; None where that is not known before loading.

    Raises:
        ConfigError: a folder, bundled name or hub id that cannot be loaded.
    """
    context = config.model.max_context_tokens
    folder = model_files.locate(config.model.path, "model.path")
    policy = model_files.check_folder(folder, "model.path", chat=True, max_context_tokens=context) if folder else None
    if folder and config.training.lora is not None:
        check_adapters(config.training.lora, str(folder), "model.path")
    if config.model.critic_path is not None:
        critic = model_files.locate(config.model.critic_path, "model.critic_path")
        if critic:
            model_files.check_folder(critic, "model.critic_path", chat=False)
            if config.training.lora is not None:
                check_adapters(config.training.lora, str(critic), "model.critic_path")
        if folder and critic:
            model_files.check_same_tokens(folder, critic, "model.critic_path")
    trained = policy  # the model that preferences train: the policy's, unless it has a base of its own
    if config.preferences and config.preferences.reward_model.base:
        trained = _plain_model(config.preferences.reward_model.base, "preferences.reward_model.base")
    reward_models = []
    for index, component in enumerate(config.rewards):
        if component.model == "preferences":
            reward_models.append(trained)
        elif component.model is not None:
            reward_models.append(_reward_model(component.model, f"rewards.{index}.model"))
    for index, judge in enumerate(config.evaluation.judges):
        if judge.model not in (None, "preferences"):
            _reward_model(str(judge.model), f"evaluation.judges.{index}.model")
    return policy, reward_models


def _plain_model(path: str, field: str) -> int | None:
    folder = model_files.locate(path, field)
    return model_files.check_folder(folder, field, chat=False) if folder else None


def _reward_model(path: str, field: str) -> int | None:
    parameters = _plain_model(path, field)
    if folder := model_files.locate(path, field):
        model_files.check_typical_features(folder, field)
    return parameters


def read_prompts(config: Config) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training and held-out rows.

    Raises:
        ConfigError: a file or row that cannot be used.
    """
    prompts = config.prompts
    rows = read_rows(prompts.path)
    eval_rows = read_rows(prompts.eval_path) if prompts.eval_path else None
    return split(rows, eval_rows=eval_rows, eval_count=prompts.eval_count, seed=config.seed)


def check_preferences(config: Config) -> None:
    """Raises ConfigError if a file of judged rows is missing or empty, or the store of people's votes does not open.

    Whoever trains on the rows reads them.
    """
    if config.preferences is None:
        return
    check_judged_files(config.preferences.paths)
    if (people := config.preferences.people) is not None:
        check_store(people.store, "preferences.people.store")


def check_store(place: str, field: str) -> None:
    """Raises ConfigError unless a feedback store is at `place`, a file or URL, or can be made there."""
    if "://" not in place and not Path(place).exists():
        if not os.access(Path(place).parent, os.W_OK):
            raise ConfigError(f"{field} {place}: no such file, and none can be made in {Path(place).resolve().parent}")
        return  # it is made when there is something to ask
    try:
        Store(place).close()
    except (Refused, SQLAlchemyError) as error:
        raise ConfigError(f"{field} {place}: {first_line(error)}") from error


def check_judged_files(paths: Sequence[Path]) -> None:
    """Raises ConfigError if one is missing or empty."""
    for path in paths:
        if not path.is_file():
            problem = "is a folder; name one file" if path.is_dir() else "no such file"
            raise ConfigError(f"preferences.path {path}: {problem}")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"preferences.path {path}: may not be read by this user")
        if path.stat().st_size == 0:
            raise ConfigError(f"preferences.path {path}: is empty")


def _functions(config: Config) -> Iterator[tuple[str, str]]:
    for field, components in (("rewards", config.rewards), ("evaluation.judges", config.evaluation.judges)):
        for index, component in enumerate(components):
            if component.function is not None:
                yield f"{field}.{index}.function", component.function
    if config.preferences and config.preferences.simulate:
        yield "preferences.simulate.gold", config.preferences.simulate.gold


def check_function(path: str, field: str) -> None:
    """Raises ConfigError unless `module:function` can be imported and called."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{field} {path}: cannot be imported: {reason}; modules are looked for in {Path.cwd()} if it is on "
            "PYTHONPATH, and among installed packages"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        problem = "has no" if function is None else "cannot be called:"
        raise ConfigError(f"{field} {path}: {module_name} {problem} {name}")
