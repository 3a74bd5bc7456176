"""Records to tensors, and a batch's responses to micro-batches by token budget, balanced over ranks.

B responses, T response tokens, n response tokens of some rows, end to end. Masks are 1 where a token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contracts.records import ScoredRollout
from learner.advantage import equal_groups
from models.packing import Layout, pack, pad

_LARGEST = float(np.finfo(np.float32).max)  # beyond it a number is infinite in the learner's tensors


@dataclass(frozen=True)
class Experience:
    """A batch in response coordinates: column t is response token t, whatever the length of the prompt.

    `trained_BT` is the mask without the tokens that are too old for the loss.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    groups_B: Tensor
    mask_BT: Tensor
    trained_BT: Tensor
    behavior_logprobs_BT: Tensor
    reference_logprobs_BT: Tensor | None  # None: the run does not ask for them
    scores_B: Tensor
    truncated_B: Tensor

    def __len__(self) -> int:
        return len(self.responses)

    def flat(self, values_BT: Tensor, rows: Sequence[int]) -> Tensor:
        """The valid tokens of `rows`, end to end: [n], or [n + rows] where `values_BT` has a column more than T."""
        picked = torch.as_tensor(rows)
        mask = self.mask_BT[picked]
        if values_BT.shape[1] > mask.shape[1]:
            mask = torch.cat([mask.new_ones(len(picked), 1), mask], dim=1)
        return values_BT[picked][mask]

    def tokens(self, rows: Sequence[int]) -> Tensor:
        """Response tokens of `rows`, end to end: [n]."""
        return torch.tensor([token for row in rows for token in self.responses[row]])

    def layout(self, rows: Sequence[int], packing: str) -> Layout:
        """`rows` for one forward pass."""
        prompts, responses = [self.prompts[row] for row in rows], [self.responses[row] for row in rows]
        if packing == "padded":
            return pad(prompts, responses)
        return pack(prompts, responses, share_prompts=packing == "shared_prompts")


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. One that does not count keeps a rank in step with the others: its
    loss is 0, but it takes part in every collective."""

    rows: list[int]
    counts: bool = True


def to_experience(batch: Sequence[ScoredRollout], *, token_budget: int, oldest_version: int = 0) -> Experience:
    """Tensors of a batch, response side padded with zeros to the longest response.

    Tokens sampled by weights older than `oldest_version` stay in the batch and out of the loss: what came after them
    was sampled in their context.

    Raises:
        ValueError: a prompt or response is empty, a sequence is longer than the budget of a micro-batch, or a number is
            not finite in float32; names the trajectory.
    """
    if not batch:
        raise ValueError("the batch is empty")
    width = max(len(sample.rollout.response_tokens) for sample in batch)
    mask_BT = torch.zeros(len(batch), width, dtype=torch.bool)
    trained_BT = torch.zeros(len(batch), width, dtype=torch.bool)
    behavior_BT = torch.zeros(len(batch), width)
    reference_BT = torch.zeros(len(batch), width) if all(sample.reference_logprobs for sample in batch) else None
    groups: dict[str, int] = {}
    for row, sample in enumerate(batch):
        problem = problem_of(sample, token_budget=token_budget)
        if problem is not None:
            raise ValueError(f"trajectory {sample.rollout.trajectory_id}: {problem}")
        length = len(sample.rollout.response_tokens)
        mask_BT[row, :length] = True
        trained_BT[row, :length] = torch.tensor(sample.rollout.weights_versions) >= oldest_version
        behavior_BT[row, :length] = torch.tensor(sample.rollout.behavior_logprobs)
        if reference_BT is not None:
            reference_BT[row, :length] = torch.tensor(sample.reference_logprobs)
        groups.setdefault(sample.rollout.group_id, len(groups))
    return Experience(
        prompts=[sample.rollout.prompt_tokens for sample in batch],
        responses=[sample.rollout.response_tokens for sample in batch],
        groups_B=torch.tensor([groups[sample.rollout.group_id] for sample in batch]),
        mask_BT=mask_BT,
        trained_BT=trained_BT,
        behavior_logprobs_BT=behavior_BT,
        reference_logprobs_BT=reference_BT,
        scores_B=torch.tensor([sample.reward for sample in batch], dtype=torch.float32),
        truncated_B=torch.tensor([sample.rollout.finish_reason == "length" for sample in batch]),
    )


def problem_of(sample: ScoredRollout, *, token_budget: int) -> str | None:
    """Why a trajectory cannot be trained on, None if it can."""
    rollout = sample.rollout
    numbers = {
        "reward": [sample.reward],
        "behavior_logprobs": rollout.behavior_logprobs,
        "reference_logprobs": sample.reference_logprobs,
    }
    for name in ("prompt", "response"):
        if not getattr(rollout, f"{name}_tokens"):
            return f"the {name} is empty"
    length = len(rollout.prompt_tokens) + len(rollout.response_tokens)
    if length > token_budget:
        return f"{length} tokens are more than training.micro_batch_tokens {token_budget}"
    for name, values in numbers.items():
        if not (np.abs(np.asarray(values, dtype=np.float64)) <= _LARGEST).all():
            return f"{name} is not finite"
    return None


def rewards_equal(group: Sequence[ScoredRollout]) -> bool:
    """Whether a group's rewards tell its responses apart not at all (DAPO's dynamic sampling)."""
    rewards_R = torch.tensor([sample.reward for sample in group], dtype=torch.float64)
    return bool(equal_groups(rewards_R, torch.zeros(len(group), dtype=torch.long)).all())


def plan_micro_batches(
    experience: Experience, rows: Sequence[int], *, token_budget: int, num_ranks: int, packing: str
) -> list[list[MicroBatch]]:
    """Cut `rows` into micro-batches of at most `token_budget` tokens: a list for each rank, all of one length.

    As few as possible and of like size (longest processing time first), so that ranks finish together. With shared
    prompts a group stays together where the budget allows it.

    Raises:
        ValueError: a sequence is longer than the budget.
    """
    units = _padded_units(experience, rows, token_budget) if packing == "padded" else [[row] for row in rows]
    if packing == "shared_prompts":
        units = _group_units(experience, rows, token_budget)
        if len(units) < num_ranks:
            units = [[row] for row in rows]
    sizes = [_num_tokens(experience, unit, packing) for unit in units]
    if max(sizes) > token_budget:
        raise ValueError(f"a sequence of {max(sizes)} tokens is longer than the budget of {token_budget}")
    if packing == "padded":  # a unit is a micro-batch: joined, they would be padded to the longest
        num_bins = _rounded_up(len(units), num_ranks)
        bins = _longest_first(sizes, num_bins)
    else:
        num_bins = _rounded_up(-(-sum(sizes) // token_budget), num_ranks)
        while True:
            bins = _longest_first(sizes, num_bins)
            if max(sum(sizes[unit] for unit in units_of) for units_of in bins) <= token_budget:
                break
            num_bins += num_ranks
    stand_in = min(rows, key=lambda row: len(experience.prompts[row]) + len(experience.responses[row]))
    cuts = [
        MicroBatch([row for unit in units_of for row in units[unit]]) if units_of else MicroBatch([stand_in], False)
        for units_of in bins
    ]
    return [cuts[rank::num_ranks] for rank in range(num_ranks)]


def _group_units(experience: Experience, rows: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows of one prompt together; a group over the budget in pieces."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(experience.prompts[row]), []).append(row)
    units: list[list[int]] = []
    for prompt, members in groups.items():
        room = 0
        for row in members:
            if len(experience.responses[row]) > room:
                units.append([])
                room = token_budget - len(prompt)
            units[-1].append(row)
            room -= len(experience.responses[row])
    return units


def _padded_units(experience: Experience, rows: Sequence[int], token_budget: int) -> list[list[int]]:
    """Longest first, so that sequences of like length are padded together."""
    units: list[list[int]] = []
    ordered = sorted(rows, key=lambda row: -len(experience.prompts[row]) - len(experience.responses[row]))
    for row in ordered:
        if units and _num_tokens(experience, [*units[-1], row], "padded") <= token_budget:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def _num_tokens(experience: Experience, rows: Sequence[int], packing: str) -> int:
    lengths = [len(experience.prompts[row]) + len(experience.responses[row]) for row in rows]
    if packing == "padded":
        return max(lengths) * len(rows)
    repeated = len(experience.prompts[rows[0]]) * (len(rows) - 1) if packing == "shared_prompts" else 0
    return sum(lengths) - repeated


def _longest_first(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices of `sizes` in bins of like sum (Graham 1969): each goes, the largest first, to the emptiest bin."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        emptiest = loads.index(min(loads))
        bins[emptiest].append(index)
        loads[emptiest] += sizes[index]
    order = sorted(range(num_bins), key=lambda number: -loads[number])
    return [bins[number] for number in order]


def _rounded_up(number: int, multiple: int) -> int:
    return max(1, -(-number // multiple)) * multiple
