"""Load a reward model and score dialogues with it.

B dialogues, T tokens, H hidden size. A mask is 1 where a token counts. A reward model is a Hugging Face
sequence classification model with one label over a decoder: `model.base_model` gives hidden states, `model.score`
turns the last one into a number. Two optional float32 scalars beside the weights, `score_mean` and `score_std`,
freeze a normalisation; plain `from_pretrained` ignores them.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging

from models.bundled import resolve

Dialogue = list[dict[str, str]]

MICRO_BATCH_SIZE = 16  # dialogues a forward pass
logger = logging.getLogger(__name__)


class RewardModel:
    """Scores dialogues with a frozen reward model, (raw - score_mean) / score_std. Made by `load`."""

    def __init__(
        self, model: Any, tokenizer: Any, *, score_mean: float, score_std: float, version: str, max_tokens: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.score_mean = score_mean
        self.score_std = score_std
        self.version = version  # 12 hex digits of the SHA-256 of the safetensors files
        self.max_tokens = max_tokens

    @classmethod
    def load(cls, path: str, *, dtype: str = "bfloat16", device: str = "cpu", max_tokens: int) -> Self:
        """The reward model in a folder (or hub id, or `bundled:NAME`), in eval mode, its head in float32.

        Raises:
            ValueError: no such model, no tokenizer or chat template, not a one-label sequence classification
                model over a decoder, or weights (above all the score head) that the files do not hold.
        """
        folder = _local_folder(path)
        tokenizer = load_tokenizer(str(folder), name=path)
        _check_config(folder, path)
        files = _weight_files(folder, path)
        with quiet_loading():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
            )
        if absent := sorted(info["missing_keys"]):
            raise ValueError(f"{path}: its files do not hold {', '.join(absent)}, which would score at random")
        if "score" not in dict(model.named_children()):
            raise ValueError(f"{path}: {type(model).__name__} has no `score` head over a decoder's last token")
        model.score.float()
        tensors = _normalisation(files)
        return cls(
            model.to(device).eval(),
            tokenizer,
            score_mean=tensors.get("score_mean", 0.0),
            score_std=tensors.get("score_std", 1.0),
            version=_digest(files),
            max_tokens=max_tokens,
        )

    def score(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """One score a dialogue, in the order given. Each ends with the assistant message to be judged.

        Micro-batches are filled by length, so a score depends on its neighbours only through the last bits. A
        dialogue above `max_tokens` loses its beginning, never its end. A score that is not finite is returned
        as it is: the caller decides.

        Raises:
            ValueError: a dialogue that does not end with an assistant message.
        """
        tokens = render(self.tokenizer, dialogues, max_tokens=self.max_tokens)
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        scores = [0.0] * len(tokens)
        for start in range(0, len(order), MICRO_BATCH_SIZE):
            rows = order[start : start + MICRO_BATCH_SIZE]
            tokens_BT, mask_BT = pad_right([tokens[row] for row in rows])
            with torch.inference_mode():
                raw_B = raw_scores(self.model, tokens_BT, mask_BT)
            for row, raw in zip(rows, raw_B.tolist(), strict=True):
                scores[row] = (raw - self.score_mean) / self.score_std
        return scores


def raw_scores(model: Any, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Scores [B] in float32, before normalisation, from the last token that the mask counts.

    The pad id plays no part (it may equal EOS), and padding may be on either side.
    """
    tokens_BT, mask_BT = tokens_BT.to(model.device), mask_BT.to(model.device)
    positions_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)
    hidden_BTH = model.base_model(
        input_ids=tokens_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    return score_head(model, hidden_BTH[torch.arange(len(mask_BT), device=mask_BT.device), last_token(mask_BT)])


def score_head(model: Any, hidden_BH: Tensor) -> Tensor:
    """Scores [B] in float32, under autocast too. `model.score` must be float32."""
    with torch.autocast(hidden_BH.device.type, enabled=False):
        scores_B: Tensor = model.score(hidden_BH.float()).squeeze(-1)
    return scores_B


def last_token(mask_BT: Tensor) -> Tensor:
    """Index [B] of the last token that counts."""
    num_tokens = mask_BT.shape[1]
    return num_tokens - 1 - mask_BT.flip(1).long().argmax(1)


def render(tokenizer: Any, dialogues: Sequence[Dialogue], *, max_tokens: int) -> list[list[int]]:
    """Token ids of each dialogue in the tokenizer's chat template, cut from the left to `max_tokens`.

    Raises:
        ValueError: a dialogue that does not end with an assistant message.
    """
    for row, dialogue in enumerate(dialogues):
        if not dialogue or dialogue[-1]["role"] != "assistant":
            raise ValueError(f"dialogue {row} does not end with an assistant message: nothing to score")
    if not dialogues:
        return []
    tokens = tokenizer.apply_chat_template(list(dialogues), tokenize=True, return_dict=False)
    if too_long := sum(len(ids) > max_tokens for ids in tokens):
        logger.warning("%d of %d dialogues cut from the left to %d tokens", too_long, len(tokens), max_tokens)
    return [ids[-max_tokens:] for ids in tokens]


def pad_right(tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] and their mask. Padding holds token 0: only the mask says what counts."""
    num_tokens = max(map(len, tokens))
    tokens_BT = torch.zeros(len(tokens), num_tokens, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, ids in enumerate(tokens):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    return tokens_BT, mask_BT


def load_tokenizer(path: str, *, name: str | None = None) -> Any:
    """The tokenizer of a model folder or id; `name` is what errors call it.

    Raises:
        ValueError: it has no tokenizer, or the tokenizer no chat template.
    """
    name = name or path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no tokenizer there that loads ({_first_line(error)})") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"{name}: its tokenizer has no chat template, so dialogues cannot be rendered for it")
    return tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' table of missing and unexpected keys: the loading info is checked by code instead."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _local_folder(path: str) -> Path:
    path = resolve(path)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: neither a folder nor a model the hub has ({_first_line(error)})") from error


def _check_config(folder: Path, name: str) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no config.json there that loads ({_first_line(error)})") from error
    architecture = (config.architectures or ["model of unknown architecture"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise ValueError(f"{name}: a {architecture}, not a sequence classification model with a trained score head")
    if config.num_labels != 1:
        raise ValueError(f"{name}: a classifier with num_labels {config.num_labels}, a reward model has 1")


def _weight_files(folder: Path, name: str) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{name}: no model*.safetensors there")
    return files


def _normalisation(files: Sequence[Path]) -> dict[str, float]:
    tensors: dict[str, float] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            present = {"score_mean", "score_std"}.intersection(weights.keys())
            tensors |= {key: float(weights.get_tensor(key)) for key in present}
    return tensors


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
