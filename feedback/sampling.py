"""Which pair to ask people about next, out of those that wait. Pure and seeded: the same input, the same questions.

P pairs that wait, N pairs that are labelled, E members of an ensemble of reward models, D features. Each way of asking
returns indices of pairs, the most useful first; ties go to the lower index unless it says otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from feedback.text_features import text_differences

_PRIME = (1 << 31) - 1
PRIOR_PRECISION = 100.0  # of each weight, on features of deviation 1; of benchmarks.feedback asking


def ask_at_random(num_pairs: int, count: int, *, seed: int) -> NDArray[np.intp]:
    """`count` pairs, or all where fewer wait, every one as likely."""
    _check_count(count)
    return np.random.default_rng(seed).permutation(num_pairs)[:count]


def disagreement(probabilities_EP: NDArray[np.float64]) -> NDArray[np.float64]:
    """What an answer would tell about the model, in nats: entropy of the mean less mean of the entropies.

    Houlsby, Huszár, Ghahramani & Lengyel 2011, "Bayesian Active Learning for Classification and Preference
    Learning" (BALD), section 3. A pair that every member calls even gains nothing: it is noise, not ignorance.

    Args:
        probabilities_EP: each member's probability that a is better.

    Raises:
        ValueError: fewer than two members, or a probability outside 0 to 1.
    """
    if probabilities_EP.ndim != 2 or len(probabilities_EP) < 2:
        raise ValueError(f"probabilities have shape {probabilities_EP.shape}, needed is (at least 2 members, pairs)")
    if not ((probabilities_EP >= 0) & (probabilities_EP <= 1)).all():
        raise ValueError("probabilities: allowed is 0 to 1, and no NaN")
    return np.maximum(_entropy(probabilities_EP.mean(axis=0)) - _entropy(probabilities_EP).mean(axis=0), 0.0)


def ask_uncertain(uncertainty_P: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """The pairs of greatest uncertainty, of `disagreement` say."""
    _check_count(count)
    return np.argsort(-uncertainty_P, kind="stable")[:count]


def ask_uncertain_and_diverse(
    uncertainty_P: NDArray[np.float64], features_PD: NDArray[np.float64], count: int, *, pool: int = 4
) -> NDArray[np.intp]:
    """Of the `pool * count` most uncertain pairs, those that lie far apart; the most uncertain one is first.

    Greedy k-center: each next pair is the one farthest from all that are chosen (Gonzalez 1985, "Clustering to
    Minimize the Maximum Intercluster Distance"; for labels, Sener & Savarese 2018, "Active Learning for Convolutional
    Neural Networks: A Core-Set Approach"), by cosine. A difference of two responses means the same question with
    the sides swapped, so features and their negatives count as equal.
    """
    _check_count(count)
    if pool < 1:
        raise ValueError(f"pool is {pool}, allowed is 1 or more")
    candidates = ask_uncertain(uncertainty_P, pool * count)
    norms = np.linalg.norm(features_PD[candidates], axis=1, keepdims=True)
    directions = features_PD[candidates] / np.maximum(norms, 1e-12)
    chosen: list[int] = []
    nearest = np.full(len(candidates), -1.0)  # greatest |cosine| with any that is chosen
    for _ in range(min(count, len(candidates))):
        nearest[chosen] = np.inf
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, np.abs(directions @ directions[chosen[-1]]))
    return candidates[chosen]


def laplace_covariance(
    features_ND: NDArray[np.float64], probabilities_N: NDArray[np.float64], *, ridge: float
) -> NDArray[np.float64]:
    """How unsure a logistic model on N labelled pairs is of its D weights, at its most probable ones.

    The Gaussian of Laplace's method: the inverse of the negative log posterior's Hessian (MacKay 1992, "The Evidence
    Framework Applied to Classification Networks").

    Args:
        features_ND: differences of the two responses' features.
        probabilities_N: the model's own, that a is better.
        ridge: precision of the Gaussian prior on each weight.
    """
    weighted_ND = features_ND * (probabilities_N * (1 - probabilities_N))[:, None]
    precision_DD = weighted_ND.T @ features_ND + ridge * np.eye(features_ND.shape[1])
    return np.asarray(np.linalg.inv(precision_DD), dtype=np.float64)


def ask_to_predict(
    features_PD: NDArray[np.float64],
    probabilities_P: NDArray[np.float64],
    covariance_DD: NDArray[np.float64],
    count: int,
    *,
    target_DD: NDArray[np.float64] | None = None,
) -> NDArray[np.intp]:
    """The pairs whose labels together make predictions surest, chosen one after the other; nobody is asked twice alike.

    Each next pair is the one that takes most variance off the predicted log odds of the pairs that `target_DD`
    describes, given all that are chosen before (MacKay 1992, "Information-Based Objective Functions for Active Data
    Selection"; for logistic models Schein & Ungar 2007, "Active learning for logistic regression: an evaluation").
    What a label will be is not needed for that, so a batch is planned before the first of its answers. A label of a
    pair x that has probability p lowers the covariance S by S x xᵀ S / (1 / (p (1 - p)) + xᵀ S x).

    Args:
        probabilities_P: that a is better, as the model has it now.
        covariance_DD: of `laplace_covariance`.
        target_DD: mean of x xᵀ over the pairs that matter; default: over these.
    """
    _check_count(count)
    target_DD = features_PD.T @ features_PD / len(features_PD) if target_DD is None else target_DD
    weight_P = np.maximum(probabilities_P * (1 - probabilities_P), 1e-6)
    spread_PD = features_PD @ covariance_DD
    towards_PD = spread_PD @ target_DD
    free_P = np.ones(len(features_PD), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(count, len(features_PD))):
        noise_P = 1 / weight_P + np.einsum("pd,pd->p", spread_PD, features_PD)
        less_P = np.einsum("pd,pd->p", towards_PD, spread_PD) / noise_P
        chosen.append(int(np.argmax(np.where(free_P, less_P, -1.0))))
        free_P[chosen[-1]] = False
        direction_D = spread_PD[chosen[-1]].copy()
        share_P = spread_PD @ features_PD[chosen[-1]] / noise_P[chosen[-1]]
        spread_PD -= np.outer(share_P, direction_D)
        towards_PD -= np.outer(share_P, direction_D @ target_DD)
    return np.array(chosen, dtype=np.intp)


def plan_to_predict(first: Sequence[str], second: Sequence[str]) -> NDArray[np.intp]:
    """All pairs in the order of `ask_to_predict`, from their texts alone, before anybody has said anything.

    Every probability is one half. What a label takes off the covariance does not depend on what it says then, so this
    is also the order that batches would have, each planned when the one before it was labelled.
    """
    features_PD = text_differences(first, second)
    count, dimensions = features_PD.shape
    return ask_to_predict(features_PD, np.full(count, 0.5), np.eye(dimensions) / PRIOR_PRECISION, count)


def prompts_that_vary(scores_PS: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """The prompts whose S sampled responses differ most in score, by standard deviation; NaN is no sample.

    There the policy has something to learn: where all responses are alike, a vote between them says nothing.
    """
    _check_count(count)
    have_P = (~np.isnan(scores_PS)).sum(axis=1)
    known_PS = np.nan_to_num(scores_PS)
    mean_P1 = known_PS.sum(axis=1, keepdims=True) / np.maximum(have_P, 1)[:, None]
    square_PS = np.where(np.isnan(scores_PS), 0.0, (known_PS - mean_P1) ** 2)
    return np.argsort(-np.sqrt(square_PS.sum(axis=1) / np.maximum(have_P, 1)), kind="stable")[:count]


def variety(first: Sequence[str], second: Sequence[str], *, words: int = 2) -> NDArray[np.float64]:
    """1 less the Jaccard similarity of each two texts: 0 for equal ones, 1 where they share no run of words."""
    return np.array([1 - _jaccard(shingles(a, words), shingles(b, words)) for a, b in zip(first, second, strict=True)])


def without_near_duplicates(
    texts: Sequence[str], *, similarity: float = 0.8, at_most: int = 1, words: int = 3, seed: int = 0
) -> list[int]:
    """Indices to keep, in order: of texts that resemble an earlier one, `at_most` stay in all.

    Broder 1997, "On the resemblance and containment of documents": sets of runs of `words` words, MinHash signatures
    of 128 values in bands of 4 to find candidates, and the exact Jaccard similarity to judge them. A pair just at
    0.8 becomes a candidate with probability above 0.9999, at 0.5 with 0.87.

    Raises:
        ValueError: a similarity outside 0 to 1, at_most below 1.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity is {similarity}, allowed is more than 0 and at most 1")
    if at_most < 1:
        raise ValueError(f"at_most is {at_most}, allowed is 1 or more")
    sets = [shingles(text, words) for text in texts]
    rng = np.random.default_rng(seed)
    factors, offsets = rng.integers(1, _PRIME, 128), rng.integers(0, _PRIME, 128)
    buckets: dict[tuple[int, bytes], list[int]] = {}  # band and its values: the leaders that have them
    members: dict[int, int] = {}
    kept = []
    for index, own in enumerate(sets):
        keys = _bands(own, factors, offsets)
        near = sorted({leader for key in keys for leader in buckets.get(key, ())})
        leader = next((other for other in near if _jaccard(own, sets[other]) >= similarity), index)
        if leader == index:
            for key in keys:
                buckets.setdefault(key, []).append(index)
        members[leader] = members.get(leader, 0) + 1
        if members[leader] <= at_most:
            kept.append(index)
    return kept


def shingles(text: str, words: int) -> set[int]:
    """Hashes of all runs of that many words, without case; of the whole text where it is shorter."""
    tokens = text.lower().split()
    runs = [" ".join(tokens[i : i + words]) for i in range(max(len(tokens) - words + 1, 1))]
    return {zlib.crc32(run.encode()) for run in runs}  # Python's own hash differs between processes


def _bands(own: set[int], factors: NDArray[np.int64], offsets: NDArray[np.int64]) -> list[tuple[int, bytes]]:
    values = np.fromiter(own, dtype=np.int64, count=len(own)) % _PRIME
    signature = ((values[:, None] * factors + offsets) % _PRIME).min(axis=0)  # below 2^62: no overflow
    return [(band, part.tobytes()) for band, part in enumerate(signature.reshape(32, 4))]


def _jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


def _entropy(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count is {count}, allowed is 1 or more")
