"""What a batch of responses looks like: one number a response and signal, from what the experience log keeps.

B responses, F numbers of a response for its distance from others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from contracts.records import ScoredRollout

Array = NDArray[np.float64]
NGRAM = 3
# What ends the names of a reward component's disagreement among its ensemble, and of its distance from the data that it
# was trained on. No component's own name has a slash.
STD, LATENT = "/std", "/latent"


@dataclass(frozen=True)
class Observed:
    """A batch. `plain` holds the signals that need no reference, by name; `held_out_B` is None without such rewards."""

    plain: dict[str, Array]
    reward_B: Array
    held_out_B: Array | None
    features_BF: Array
    num_groups: int


def observe(samples: Sequence[ScoredRollout], *, weights: Mapping[str, float]) -> Observed:
    """Measure a batch. `weights` are those of the reward components; weight 0 makes a component a held-out one."""
    tokens = [sample.rollout.response_tokens for sample in samples]
    groups = [sample.rollout.group_id for sample in samples]
    plain = {
        "length": np.array([float(len(each)) for each in tokens]),
        "repetition": np.array([repetition(each) for each in tokens]),
        "sameness": sameness(tokens, groups),
    }
    everywhere = set.intersection(*(set(sample.reward_components) for sample in samples))
    for signal, ending in (("disagreement", STD), ("latent", LATENT)):
        names = sorted(name for name in everywhere if name.endswith(ending))  # one may come while a run goes on
        if names:
            plain[signal] = _scores(samples, names).mean(axis=1)
    scored = [name for name in samples[0].reward_components if "/" not in name]
    held_out = [name for name in scored if weights.get(name) == 0]
    references = np.array([np.mean(sample.reference_logprobs or [0.0]) for sample in samples])
    return Observed(
        plain=plain,
        reward_B=np.array([sample.reward for sample in samples]),
        held_out_B=_scores(samples, held_out).mean(axis=1) if held_out else None,
        features_BF=np.column_stack([_scores(samples, scored), np.log1p(plain["length"]), references]),
        num_groups=len(set(groups)),
    )


def repetition(tokens: Sequence[int], *, n: int = NGRAM) -> float:
    """Share of a response's n-grams that it has had before: 1 - distinct-n (Li et al. 2016); 0 for fewer than two."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def sameness(tokens_B: Sequence[Sequence[int]], groups_B: Sequence[str], *, n: int = NGRAM) -> Array:
    """[B]: share of a response's distinct n-grams that responses to other prompts of the batch have too."""
    distinct_B = [set(ngrams(tokens, n)) for tokens in tokens_B]
    holders: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for distinct, group in zip(distinct_B, groups_B, strict=True):
        for gram in distinct:
            holders[gram].add(group)
    return np.array(
        [
            sum(len(holders[gram]) > 1 for gram in distinct) / len(distinct) if distinct else 0.0
            for distinct in distinct_B
        ]
    )


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def _scores(samples: Sequence[ScoredRollout], names: Sequence[str]) -> Array:
    """[B, len(names)]."""
    return np.array([[sample.reward_components[name] for name in names] for sample in samples], dtype=np.float64)
