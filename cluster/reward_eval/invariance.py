"""Whether scores depend on what must not matter: the order of the sides, the neighbours in a batch, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.reward_eval.numbers import Array, sigmoid
from models.reward import Dialogue


class Scorer(Protocol):
    """What is asked: one score a dialogue, in the order given."""

    def score(self, dialogues: Sequence[Dialogue]) -> list[float]: ...


@dataclass(frozen=True)
class Invariance:
    """Largest differences over the pairs that were asked again, in units of a score, and how many rankings changed.

    `swapped`: sides and order of the pairs reversed; `swap_probability`: |P(a better) + P(b better) - 1|, of one
    order and the other; `alone`: each dialogue by itself, without padding. `typical_margin` is the median |margin|,
    to compare them with.
    """

    pairs: int
    swapped: float
    swap_probability: float
    swapped_rankings: int
    alone: float
    alone_rankings: int
    typical_margin: float


def invariance(
    model: Scorer, dialogues_N2: Sequence[tuple[Dialogue, Dialogue]], scores_N2: Array, *, temperature: float
) -> Invariance:
    """Ask for the scores of some pairs again; `scores_N2` are those that they had among all others."""
    reversed_sides = [side for pair in reversed(dialogues_N2) for side in reversed(pair)]
    swapped_N2 = np.array(model.score(reversed_sides))[::-1].reshape(-1, 2)
    alone_N2 = np.array([[model.score([side])[0] for side in pair] for pair in dialogues_N2])
    margins_N = _margins(scores_N2)
    forward_N = sigmoid(margins_N / temperature)
    backward_N = sigmoid(-_margins(swapped_N2) / temperature)
    return Invariance(
        pairs=len(dialogues_N2),
        swapped=float(np.abs(swapped_N2 - scores_N2).max()),
        swap_probability=float(np.abs(forward_N + backward_N - 1).max()),
        swapped_rankings=int((np.sign(_margins(swapped_N2)) != np.sign(margins_N)).sum()),
        alone=float(np.abs(alone_N2 - scores_N2).max()),
        alone_rankings=int((np.sign(_margins(alone_N2)) != np.sign(margins_N)).sum()),
        typical_margin=float(np.median(np.abs(margins_N))),
    )


def _margins(scores_N2: Array) -> Array:
    margins: Array = scores_N2[:, 0] - scores_N2[:, 1]
    return margins
