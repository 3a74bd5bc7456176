"""Load a reward model and score dialogues with it.

B or N dialogues, T tokens, H hidden size, K members of an ensemble, L labels: heads times K. A mask is 1 where a token
counts. A reward model is a Hugging Face sequence classification model over a decoder: `model.base_model` gives hidden
states, `model.score` turns the last one into a number for each label. Three optional float32 tensors beside the weights
freeze what turns it into a score: `score_mean` [L], `score_std` and `temperature` [heads]; plain `from_pretrained`
ignores them. With more than one label reward_card.json names the heads.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging

from models.bundled import resolve
from models.latent import TypicalFeatures
from models.reward_card import check_card, files_sha256, read_card

Dialogue = list[dict[str, str]]

DEFAULT_HEAD = "reward"
MICRO_BATCH_SIZE = 16  # dialogues a forward pass
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Scores of some dialogues and what stands behind them, all in the same units.

    `values` are what `RewardModel.score` returns, the means of `members` (of each dialogue, the score that every
    member of the ensemble gives; a reward model by itself has one). `std` is their population deviation. `latent` is
    how far each dialogue's features lie from those of the training data, about 1 for one like these (models/latent.py);
    None from a reward model that was saved without them.
    """

    values: list[float]
    members: list[list[float]]
    std: list[float]
    latent: list[float] | None


@dataclass(frozen=True)
class RewardModel:
    """One head of a frozen reward model, made by `load`. Scores are (raw - score_mean) / score_std.

    An ensemble is several rows of one `score` layer, `columns`; each is centred by itself, for its offset means nothing
    to a comparison, and all are divided by the deviation of their mean. P(a is better than b), as calibrated, is
    sigmoid((score(a) - score(b)) / temperature). `version` is 12 hex digits of the SHA-256 of the safetensors files.
    """

    model: Any
    tokenizer: Any
    heads: tuple[str, ...]  # all that the folder has
    head: str  # the one that scores
    columns: tuple[int, ...]
    member_means: tuple[float, ...]
    score_std: float
    temperature: float
    version: str
    max_tokens: int
    typical: TypicalFeatures | None

    @property
    def score_mean(self) -> float:
        return sum(self.member_means) / len(self.member_means)

    @property
    def num_members(self) -> int:
        return len(self.columns)

    @classmethod
    def load(
        cls, path: str, *, dtype: str = "bfloat16", device: str = "cpu", max_tokens: int, head: str | None = None
    ) -> Self:
        """The reward model in a folder (or hub id, or `bundled:NAME`), in eval mode, its heads in float32.

        Raises:
            ValueError: no such model, no tokenizer or chat template, another one than its card says, not a sequence
                classification model over a decoder, weights (above all the score head) that the files do not hold,
                several heads, of which `head` names none, or typical features of another width.
        """
        models = cls.load_heads(path, dtype=dtype, device=device, max_tokens=max_tokens)
        name = next(iter(models)) if head is None and len(models) == 1 else head
        if name not in models:
            raise ValueError(f"{path}: has the heads {', '.join(models)}; say which one scores, not {head}")
        return models[name]

    @classmethod
    def load_heads(cls, path: str, *, dtype: str = "bfloat16", device: str = "cpu", max_tokens: int) -> dict[str, Self]:
        """Every head of a reward model by name, over one and the same network. Raises as `load`."""
        folder = _local_folder(path)
        tokenizer = load_tokenizer(str(folder), name=path)
        card = read_card(folder)
        if card is not None:
            check_card(card, tokenizer, name=path)
        heads, members = (tuple(card["heads"]), int(card["members"])) if card is not None else ((DEFAULT_HEAD,), 1)
        _check_config(folder, path, num_labels=len(heads) * members)
        files = weight_files(folder, path)
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
            )
        if absent := sorted(info["missing_keys"]):
            raise ValueError(f"{path}: its files do not hold {', '.join(absent)}, which would score at random")
        if "score" not in dict(model.named_children()):
            raise ValueError(f"{path}: {type(model).__name__} has no `score` head over a decoder's last token")
        model.score.float()
        model.to(device).eval()
        means, stds, temperatures = _normalisation(files, num_heads=len(heads), num_labels=len(heads) * members)
        version = files_sha256(files)[:12]
        typical = TypicalFeatures.load(folder, hidden_size=model.score.in_features)
        found = {}
        for at, name in enumerate(heads):
            columns = tuple(range(at * members, (at + 1) * members))
            found[name] = cls(
                model=model,
                tokenizer=tokenizer,
                heads=heads,
                head=name,
                columns=columns,
                member_means=tuple(means[column] for column in columns),
                score_std=stds[at],
                temperature=temperatures[at] / stds[at],
                version=version,
                max_tokens=max_tokens,
                typical=typical,
            )
        return found

    def score(self, dialogues: Sequence[Dialogue]) -> list[float]:
        """One score a dialogue, in the order given. Each ends with the assistant message to be judged.

        Micro-batches are filled by length, so a score depends on its neighbours only through the last bits. A
        dialogue above `max_tokens` loses its beginning, never its end. A score that is not finite is returned
        as it is: the caller decides.

        Raises:
            ValueError: a dialogue that does not end with an assistant message.
        """
        return self.scores(dialogues).values

    def scores(self, dialogues: Sequence[Dialogue]) -> Scores:
        """The same, with the score of every member of the ensemble, and distances. Raises as `score`."""
        hidden_NH = self.features(dialogues)
        with torch.inference_mode():
            raw_NK = head_scores(self.model, hidden_NH)[:, list(self.columns)].cpu()
        latent = None if self.typical is None else self.typical.distances(hidden_NH.double().cpu().numpy()).tolist()
        members = [
            [(raw - mean) / self.score_std for raw, mean in zip(row, self.member_means, strict=True)]
            for row in raw_NK.tolist()
        ]
        values = [sum(row) / len(row) for row in members]
        return Scores(values, members, [_population_std(row) for row in members], latent)

    def features(self, dialogues: Sequence[Dialogue]) -> Tensor:
        """The hidden state [N, H] of each dialogue's last token, in float32: what the heads see. Raises as `score`."""
        tokens = render(self.tokenizer, dialogues, max_tokens=self.max_tokens)
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        hidden_NH = torch.zeros(len(tokens), self.model.score.in_features, device=self.model.device)
        for start in range(0, len(order), MICRO_BATCH_SIZE):
            rows = order[start : start + MICRO_BATCH_SIZE]
            with torch.inference_mode():
                hidden_NH[rows] = last_hidden(self.model, *pad_right([tokens[row] for row in rows])).float()
        return hidden_NH


def raw_scores(model: Any, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Scores [B, L] of the L rows of the score head in float32, before normalisation."""
    return head_scores(model, last_hidden(model, tokens_BT, mask_BT))


def last_hidden(model: Any, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Hidden states [B, H] of the last token that the mask counts.

    The pad id plays no part (it may equal EOS), and padding may be on either side.
    """
    tokens_BT, mask_BT = tokens_BT.to(model.device), mask_BT.to(model.device)
    positions_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)
    hidden_BTH: Tensor = model.base_model(
        input_ids=tokens_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    return hidden_BTH[torch.arange(len(mask_BT), device=mask_BT.device), last_token(mask_BT)]


def head_scores(model: Any, hidden_BH: Tensor) -> Tensor:
    """Scores [B, L] in float32, under autocast too. `model.score` must be float32."""
    with torch.autocast(hidden_BH.device.type, enabled=False):
        scores_BL: Tensor = model.score(hidden_BH.float())
    return scores_BL


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
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and table of missing and unexpected keys: the loading info is checked by code."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _local_folder(path: str) -> Path:
    path = resolve(path)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: neither a folder nor a model the hub has ({_first_line(error)})") from error


def _check_config(folder: Path, name: str, *, num_labels: int) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no config.json there that loads ({_first_line(error)})") from error
    architecture = (config.architectures or ["model of unknown architecture"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise ValueError(f"{name}: a {architecture}, not a sequence classification model with a trained score head")
    if config.num_labels != num_labels:
        raise ValueError(
            f"{name}: a classifier with num_labels {config.num_labels}, a reward model has {num_labels}"
            f"{'' if num_labels > 1 else ', unless its reward_card.json names the heads'}"
        )


def weight_files(folder: Path, name: str) -> list[Path]:
    """Raises ValueError where the folder has no safetensors."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{name}: no model*.safetensors there")
    return files


def _normalisation(
    files: Sequence[Path], *, num_heads: int, num_labels: int
) -> tuple[list[float], list[float], list[float]]:
    """Means of the rows of the score head, deviations and temperatures (both of raw scores) of the heads."""
    tensors: dict[str, list[float]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in {"score_mean", "score_std", "temperature"}.intersection(weights.keys()):
                tensors[key] = weights.get_tensor(key).reshape(-1).tolist()
    return (
        tensors.get("score_mean", [0.0] * num_labels),
        tensors.get("score_std", [1.0] * num_heads),
        tensors.get("temperature", [1.0] * num_heads),
    )


def _population_std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
