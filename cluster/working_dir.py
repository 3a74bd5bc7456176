"""What a job takes along to a cluster: the files of the working directory that no ignore file names.

Ray zips them without compressing and refuses more than 100 MiB, but only once everything is sent: looked at here first.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env import packaging

from contracts.config import Config, ConfigError

LIMIT_BYTES = packaging.GCS_STORAGE_MAX_SIZE
_SHOWN_FOLDERS = 3
_SILENT = logging.getLogger(f"{__name__}.ray")
_SILENT.setLevel(logging.CRITICAL)
_IGNORED = ".rayignore, .gitignore or --exclude leaves it out"


def sent_files(folder: Path, excludes: Sequence[str]) -> dict[Path, int]:
    """Bytes in the package by file, relative to `folder`: what Ray sends of it with these `excludes`."""
    folder = folder.absolute()
    files: dict[Path, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            name = path.relative_to(folder)
            headers = 76 + 2 * len(os.fsencode(name))  # a zip file's two records of each file
            files[name] = path.stat().st_size + headers

    respected = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    patterns = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    # Ray's own walk: what counts as ignored has to be what Ray leaves out, to the letter.
    ignored = [packaging._get_excludes(folder, patterns)]
    packaging._dir_travel(folder, ignored, take, include_gitignore=respected, logger=_SILENT)
    return files


def check_size(folder: Path, files: dict[Path, int], limit_bytes: int = LIMIT_BYTES) -> None:
    """Raises ConfigError where Ray would refuse the package, naming its size and the largest folders."""
    total = sum(files.values())
    if total < limit_bytes:
        return
    folders: Counter[str] = Counter()
    for name, size in files.items():
        folders[f"{name.parts[0]}/" if len(name.parts) > 1 else str(name)] += size
    largest = ", ".join(f"{name} {_mib(size)}" for name, size in folders.most_common(_SHOWN_FOLDERS))
    raise ConfigError(
        f"{folder} is {_mib(total)}, and Ray takes at most {_mib(limit_bytes)}; largest: {largest}; leave them out "
        "with --exclude or a .rayignore file, and put what the run needs where all nodes see it"
    )


def check_inputs(config: Config, folder: Path, files: dict[Path, int]) -> None:
    """What the configuration names by a relative path has to be in the package, and results must not end up there.

    Absolute paths are the cluster's: the job looks at them itself.

    Raises:
        ConfigError: one line that names the field.
    """
    if not config.output_dir.is_absolute():
        raise ConfigError(
            f"output_dir: {config.output_dir} is relative, and a job's working directory is deleted when it has ended; "
            "name a folder that all nodes see, for example output_dir=/mnt/shared/runs/mine"
        )
    for field, path in _inputs(config):
        if path.is_absolute():
            continue
        if not (folder / path).exists():
            raise ConfigError(f"{field}: {path} does not exist in {folder}, which is what the job takes along")
        _check_sent(field, path, files)
    for field, path in _perhaps_inputs(config):
        if not path.is_absolute() and (folder / path).exists():
            _check_sent(field, path, files)


def config_path(config: Path, folder: Path, files: dict[Path, int]) -> Path:
    """The configuration file as the job finds it; raises ConfigError where it does not."""
    path = config.absolute()
    if not path.is_relative_to(folder.absolute()):
        raise ConfigError(f"{config}: is not in {folder}, which is what the job takes along; submit from its folder")
    name = path.relative_to(folder.absolute())
    _check_sent("CONFIG", name, files)
    return name


def _check_sent(field: str, path: Path, files: dict[Path, int]) -> None:
    name = Path(os.path.normpath(path))
    if not any(file.is_relative_to(name) for file in files):
        raise ConfigError(f"{field}: {path} is not taken along: {_IGNORED}")


def _inputs(config: Config) -> Iterator[tuple[str, Path]]:
    """Fields that are files wherever the run is."""
    yield "prompts.path", config.prompts.path
    if config.prompts.eval_path is not None:
        yield "prompts.eval_path", config.prompts.eval_path
    if config.preferences is not None:
        yield from (("preferences.path", path) for path in config.preferences.paths)
    if config.served is not None and config.served.keys is not None:
        yield "serving.keys", config.served.keys
    if config.served is not None and config.served.gate is not None:
        yield "serving.gate.prompts", config.served.gate.prompts


def _perhaps_inputs(config: Config) -> Iterator[tuple[str, Path]]:
    """Fields that may name a folder or a module here, and something else than that as well."""
    models = {"model.path": config.model.path, "model.critic_path": config.model.critic_path}
    if config.preferences is not None:
        models["preferences.reward_model.base"] = config.preferences.reward_model.base
    for section, components in (("rewards", config.rewards), ("evaluation.judges", config.evaluation.judges)):
        for component in components:
            models[f"{section}.{component.name}.model"] = component.model
            if component.function is not None:
                module = component.function.partition(":")[0].replace(".", "/")
                yield f"{section}.{component.name}.function", Path(module + ".py")
    yield from ((field, Path(model)) for field, model in models.items() if model is not None)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
