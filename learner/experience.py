"""Records to tensors: a batch of scored rollouts, cut into micro-batches by padded token budget.

B responses, T response tokens. Masks are 1 where a token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contracts.records import ScoredRollout
from models.forward import ResponseBatch, pad_responses


@dataclass(frozen=True)
class Experience:
    """A batch in response coordinates: column t is response token t, whatever the length of the prompt."""

    sequences: list[list[int]]
    prompt_lengths: list[int]
    mask_BT: Tensor
    behavior_logprobs_BT: Tensor
    reference_logprobs_BT: Tensor
    scores_B: Tensor
    truncated_B: Tensor

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of the batch that go through the model together."""

    rows: Tensor
    responses: ResponseBatch


def to_experience(batch: Sequence[ScoredRollout]) -> Experience:
    """Tensors of a batch, response side padded with zeros to the longest response.

    Raises:
        ValueError: a response is empty or a number is not finite in float32; names the trajectory.
    """
    width = max(len(sample.rollout.response_tokens) for sample in batch)
    mask_BT = torch.zeros(len(batch), width, dtype=torch.bool)
    behavior_BT = torch.zeros(len(batch), width)
    reference_BT = torch.zeros(len(batch), width)
    for row, sample in enumerate(batch):
        _refuse_bad(sample)
        length = len(sample.rollout.response_tokens)
        mask_BT[row, :length] = True
        behavior_BT[row, :length] = torch.tensor(sample.rollout.behavior_logprobs)
        reference_BT[row, :length] = torch.tensor(sample.reference_logprobs)
    return Experience(
        sequences=[[*sample.rollout.prompt_tokens, *sample.rollout.response_tokens] for sample in batch],
        prompt_lengths=[len(sample.rollout.prompt_tokens) for sample in batch],
        mask_BT=mask_BT,
        behavior_logprobs_BT=behavior_BT,
        reference_logprobs_BT=reference_BT,
        scores_B=torch.tensor([sample.reward for sample in batch], dtype=torch.float32),
        truncated_B=torch.tensor([sample.rollout.finish_reason == "length" for sample in batch]),
    )


def _refuse_bad(sample: ScoredRollout) -> None:
    rollout = sample.rollout
    numbers = {
        "reward": [sample.reward],
        "behavior_logprobs": rollout.behavior_logprobs,
        "reference_logprobs": sample.reference_logprobs,
    }
    if not rollout.response_tokens:
        raise ValueError(f"trajectory {rollout.trajectory_id}: the response is empty")
    for name, values in numbers.items():
        if not torch.tensor(values, dtype=torch.float32).isfinite().all():  # 1e39 is infinite there
            raise ValueError(f"trajectory {rollout.trajectory_id}: {name} is not finite")


def micro_batches(
    experience: Experience, rows: Sequence[int], *, token_budget: int, pad_token: int
) -> list[MicroBatch]:
    """Cut `rows` into micro-batches of at most `token_budget` padded tokens, longest sequences first.

    Sorting keeps sequences of like length together, so little of the budget is padding.
    """
    ordered = sorted(rows, key=lambda row: len(experience.sequences[row]), reverse=True)
    cuts: list[list[int]] = []
    for row in ordered:
        longest = len(experience.sequences[cuts[-1][0]]) if cuts else 0
        if cuts and longest * (len(cuts[-1]) + 1) <= token_budget:
            cuts[-1].append(row)
        else:
            cuts.append([row])
    return [
        MicroBatch(
            torch.tensor(cut),
            pad_responses(
                [experience.sequences[row] for row in cut],
                [experience.prompt_lengths[row] for row in cut],
                pad_token=pad_token,
            ),
        )
        for cut in cuts
    ]
