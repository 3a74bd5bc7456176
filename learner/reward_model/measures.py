"""How often a reward model agrees with votes that it has not seen.

A pair's logit is the difference of its raw scores, a label's is its raw score: sigmoid(logit / T) is the probability
that the chosen response is better, or that the response is good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from contracts.records import Comparison
from learner.reward_model.examples import Row, dialogue
from learner.reward_model.losses import bradley_terry_loss
from models.reward import RewardModel


@dataclass(frozen=True)
class HeldOut:
    """Of rows on prompts that training has not seen."""

    rows: int
    prompts: int  # of rows whose votes name a side
    accuracy: float
    accuracy_low: float  # 95 % interval over prompts
    accuracy_high: float
    loss: float  # nats a row, of the scores as they are
    calibrated_loss: float  # divided by the temperature


def held_out(reward_model: RewardModel, rows: Sequence[Row]) -> HeldOut:
    """Prompts, not rows, count as independent, so that the interval stays honest where one prompt has many.

    Raises:
        ValueError: a score that is not finite.
    """
    found = logits(reward_model, rows)
    targets = [target_of(row) for row in rows]
    share = accuracy(found, targets)
    prompts = len({row.prompt_id or row.prompt for row, p in zip(rows, targets, strict=True) if p != 0.5})
    low, high = wilson_interval(share, prompts)
    temperature = reward_model.temperature * reward_model.score_std
    return HeldOut(
        rows=len(rows),
        prompts=prompts,
        accuracy=share,
        accuracy_low=low,
        accuracy_high=high,
        loss=cross_entropy(found, targets),
        calibrated_loss=cross_entropy([logit / temperature for logit in found], targets),
    )


def logits(reward_model: RewardModel, rows: Sequence[Row]) -> list[float]:
    """In units of raw scores, in the order of the rows.

    Raises:
        ValueError: a score that is not finite.
    """
    texts = [text for row in rows for text in _dialogues(row)]
    scores = [score * reward_model.score_std for score in reward_model.score(texts)]
    if bad := sum(not math.isfinite(score) for score in scores):
        raise ValueError(f"{bad} of {len(scores)} scores are not finite: the reward model cannot be used")
    left = iter(scores)
    return [
        next(left) - next(left) if isinstance(row, Comparison) else next(left) + reward_model.score_mean for row in rows
    ]


def target_of(row: Row) -> float:
    """The probability that the votes give."""
    return row.probability if isinstance(row, Comparison) else float(row.good)


def accuracy(margins: Sequence[float], probabilities: Sequence[float]) -> float:
    """Share of pairs ranked like the majority. Split votes (0.5) do not count, equal scores count half."""
    decided = [(d if p > 0.5 else -d) for d, p in zip(margins, probabilities, strict=True) if p != 0.5]
    return sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in decided) / len(decided) if decided else 0.5


def cross_entropy(logits: Sequence[float], probabilities: Sequence[float]) -> float:
    """Mean, in nats; 0 without rows."""
    loss = bradley_terry_loss(torch.tensor(logits), torch.tensor(probabilities), num_pairs=max(1, len(logits)))
    return float(loss)


def wilson_interval(share: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson 1927); (0, 1) without any."""
    if count == 0:
        return 0.0, 1.0
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, center - half), min(1.0, center + half)


def _dialogues(row: Row) -> list[list[dict[str, str]]]:
    responses = (row.chosen, row.rejected) if isinstance(row, Comparison) else (row.response,)
    return [dialogue(row.prompt, response) for response in responses]
