"""Batches of like length, and the forward pass over one: the two answers of a pair share their prompt.

B rows of a batch, T tokens, H hidden size, L rows of the score head. Where the architecture allows it a pair is one
row, [prompt | rest of chosen | rest of rejected], in which neither answer sees the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from learner.reward_model.examples import Example, TokenLabel, TokenPair
from models.reward import head_scores, last_hidden, pad_right

MICRO_BATCH_TOKENS = 4096  # padded tokens that one forward pass may hold, more only for a single longer pair
# Attention alone mixes tokens, and SDPA takes a mask [B, 1, T, T] as it is; other architectures get two rows a pair.
SHARED_PROMPT_MODELS = ("llama", "qwen2", "qwen3")

SomeExample = TypeVar("SomeExample", bound=Example)


def bucketed_batches(lengths: Sequence[int], batch_size: int, *, seed: int, bucket_batches: int = 8) -> list[list[int]]:
    """Every row once, in batches of like length in random order: shuffle, sort within buckets of `bucket_batches`
    batches, cut, shuffle the batches. The last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * bucket_batches
    buckets = [sorted(shuffled[at : at + size], key=lambda row: lengths[row]) for at in range(0, len(shuffled), size)]
    batches = [bucket[at : at + batch_size] for bucket in buckets for at in range(0, len(bucket), batch_size)]
    return [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]


def micro_batches(examples: Sequence[SomeExample]) -> Iterator[list[int]]:
    """Runs of places of examples whose padded tokens, prompts counted twice, stay within MICRO_BATCH_TOKENS."""
    part: list[int] = []
    longest = 0
    for place, example in enumerate(examples):
        longest = max(longest, example.longest)
        if part and 2 * longest * (len(part) + 1) > MICRO_BATCH_TOKENS:
            yield part
            part, longest = [], example.longest
        part.append(place)
    if part:
        yield part


def label_scores(model: Any, labels: Sequence[TokenLabel]) -> Tensor:
    """Raw scores [B, L] in float32."""
    return head_scores(model, label_features(model, labels))


def pair_scores(model: Any, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """Raw scores (chosen_BL, rejected_BL) in float32, equal to those of each dialogue by itself up to rounding."""
    chosen_BH, rejected_BH = pair_features(model, pairs)
    return head_scores(model, chosen_BH), head_scores(model, rejected_BH)


def label_features(model: Any, labels: Sequence[TokenLabel]) -> Tensor:
    """The heads' input [B, H]: hidden states of the last tokens."""
    return last_hidden(model, *pad_right([label.tokens for label in labels]))


def pair_features(model: Any, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """The heads' inputs (chosen_BH, rejected_BH)."""
    if not shares_prompts(model):
        hidden_2BH = last_hidden(model, *pad_right([p.chosen for p in pairs] + [p.rejected for p in pairs]))
        return hidden_2BH[: len(pairs)], hidden_2BH[len(pairs) :]
    tokens_BT, positions_BT, allowed_BTT, ends_B2 = (x.to(model.device) for x in pack_pairs(pairs))
    hidden_BTH = model.base_model(
        input_ids=tokens_BT, position_ids=positions_BT, attention_mask=allowed_BTT[:, None], use_cache=False
    ).last_hidden_state
    rows_B = torch.arange(len(pairs), device=model.device)
    return hidden_BTH[rows_B, ends_B2[:, 0]], hidden_BTH[rows_B, ends_B2[:, 1]]


def shares_prompts(model: Any) -> bool:
    config = model.config
    plain = config.model_type in SHARED_PROMPT_MODELS and config.to_dict().get("sliding_window") is None
    return plain and config._attn_implementation == "sdpa"


def pack_pairs(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row a pair: common prefix, rest of chosen, rest of rejected.

    Returns tokens_BT; positions_BT, which continue from the prefix in either rest; allowed_BTT, true where query [1]
    may see key [2]: backwards, in its own part or the prefix; ends_B2, the last tokens of chosen and rejected.
    """
    tokens_BT, mask_BT = pad_right([p.chosen + p.rejected[p.shared_tokens :] for p in pairs])
    positions_BT = torch.arange(tokens_BT.shape[1]).repeat(len(pairs), 1)
    parts_BT = torch.where(mask_BT == 1, 0, 3)  # 0 prefix, 1 chosen, 2 rejected, 3 padding
    ends_B2 = torch.empty(len(pairs), 2, dtype=torch.long)
    for row, pair in enumerate(pairs):
        shared, middle, end = pair.shared_tokens, len(pair.chosen), int(mask_BT[row].sum())
        parts_BT[row, shared:middle] = 1
        parts_BT[row, middle:end] = 2
        positions_BT[row, middle:end] -= middle - shared
        ends_B2[row, 0] = middle - 1
        ends_B2[row, 1] = end - 1 if end > middle else shared - 1
    same_BTT = parts_BT[:, :, None] == parts_BT[:, None, :]
    allowed_BTT = (same_BTT | (parts_BT == 0)[:, None, :]).tril()
    return tokens_BT, positions_BT, allowed_BTT, ends_B2
