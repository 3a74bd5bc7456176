"""Do annotators agree, and which of them should somebody look at?

A flag is a reason to look, not a verdict, and changes no aggregate. Each is a significance test for each annotator,
and the level holds for the whole panel: with honest annotators only, the chance that anybody at all is flagged is at
most `level` (Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from feedback.ballots import CHOICES, Ballots
from feedback.simulate import Vote


def krippendorff_alpha(votes: Iterable[Vote] | Ballots) -> float:
    """Agreement beyond chance on the choices as names: 1 is perfect, 0 what chance gives, below 0 contradiction.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: pairs with a single vote do not
    count, missing votes need no filling in. NaN where no two annotators met or all said the same one thing.
    """
    ballots = Ballots.of(votes)
    return nominal_alpha(ballots.pairs_N, ballots.choices_N, num_values=len(CHOICES))


def nominal_alpha(units_N: NDArray[np.intp], values_N: NDArray[np.intp], *, num_values: int) -> float:
    """Krippendorff's nominal alpha of values (0 to num_values - 1) given to units, one row for each time."""
    num_units = int(units_N.max(initial=-1)) + 1
    cells = np.bincount(units_N * num_values + values_N, minlength=num_units * num_values)
    counts_UV = cells.reshape(num_units, num_values)
    counts_UV = counts_UV[counts_UV.sum(axis=1) > 1]
    size_U1 = counts_UV.sum(axis=1, keepdims=True)
    pairable = counts_UV.sum()
    totals_V = counts_UV.sum(axis=0)
    by_chance = pairable**2 - (totals_V**2).sum()
    if by_chance == 0:
        return float("nan")
    apart = (counts_UV * (size_U1 - counts_UV) / np.maximum(size_U1 - 1, 1)).sum()
    return float(1 - (pairable - 1) * apart / by_chance)


@dataclass(frozen=True)
class Flag:
    """`observed` and `expected` are shares of `votes`; `p_value` is of this annotator by itself."""

    voter: str
    reason: Literal["left-biased", "right-biased", "too fast"]
    observed: float
    expected: float
    votes: int
    p_value: float


def side_bias(votes: Iterable[Vote] | Ballots, *, level: float = 0.05) -> list[Flag]:
    """Annotators who pick one side of the screen more often than a fair coin would.

    Exact two-sided binomial test against one half, over votes that name a side and know what was left. It holds
    because the order is drawn anew for each view; where a pair was shown in one order to all, it does not.
    """
    ballots = Ballots.of(votes)
    picks_N = ballots.signs_N * ballots.left_N  # 1 left, -1 right
    left_A, all_A = ballots.sum_A(picks_N > 0), ballots.sum_A(picks_N != 0)
    expected_A = np.full(len(all_A), 0.5)
    upper_A = binomial_tails(left_A, all_A, expected_A)
    lower_A = binomial_tails(all_A - left_A, all_A, expected_A)
    return [
        Flag(voter, "left-biased" if left > 0.5 * of else "right-biased", left / of, 0.5, int(of), p_value)
        for voter, left, of, _, p_value in _flagged(
            ballots.voters, left_A, all_A, expected_A, np.minimum(1.0, 2 * np.minimum(upper_A, lower_A)), level
        )
    ]


def too_fast(votes: Iterable[Vote] | Ballots, *, fraction: float = 1 / 3, level: float = 0.05) -> list[Flag]:
    """Annotators who are hasty more often than the others are.

    A vote is hasty if it took less than `fraction` of the median time of the others' votes on the same pair, so
    that short pairs excuse short times. The test is binomial, against the rate at which all others are hasty, and
    never less than one in a hundred.

    Raises:
        ValueError: a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}, allowed is more than 0 and less than 1")
    ballots = Ballots.of(votes)
    ballots = ballots.select(~np.isnan(ballots.active_s_N))
    median_N = _median_of_others(ballots.pairs_N, ballots.active_s_N)
    timed_N = ~np.isnan(median_N)
    hasty_N = timed_N & (ballots.active_s_N < fraction * median_N)
    hasty_A, all_A = ballots.sum_A(hasty_N), ballots.sum_A(timed_N)
    expected_A = np.maximum((hasty_A.sum() - hasty_A) / np.maximum(all_A.sum() - all_A, 1), 0.01)
    p_values_A = binomial_tails(hasty_A, all_A, expected_A)
    return [
        Flag(voter, "too fast", hasty / of, expected, int(of), p_value)
        for voter, hasty, of, expected, p_value in _flagged(
            ballots.voters, hasty_A, all_A, expected_A, p_values_A, level
        )
    ]


def binomial_tails(
    successes_A: NDArray[np.float64], trials_A: NDArray[np.float64], chances_A: NDArray[np.float64]
) -> NDArray[np.float64]:
    """P(X >= successes) for X binomial, exactly, row by row; chances strictly between 0 and 1."""
    most = int(trials_A.max(initial=0))
    log_factorial = np.append(0.0, np.cumsum(np.log(np.arange(1, most + 1))))
    tails = []
    for k, n, p in zip(successes_A.astype(int).tolist(), trials_A.astype(int).tolist(), chances_A, strict=True):
        x = np.arange(k, n + 1)
        log_p = log_factorial[n] - log_factorial[x] - log_factorial[n - x] + x * np.log(p) + (n - x) * np.log1p(-p)
        tails.append(min(1.0, float(np.exp(log_p).sum())))
    return np.array(tails)


def _flagged(
    voters: Sequence[str],
    observed_A: NDArray[np.float64],
    all_A: NDArray[np.float64],
    expected_A: NDArray[np.float64],
    p_values_A: NDArray[np.float64],
    level: float,
) -> list[tuple[str, float, float, float, float]]:
    """(voter, observed, all, expected, p value) of those that Holm's procedure rejects, least p value first."""
    tested = np.flatnonzero(all_A > 0)
    order = tested[np.argsort(p_values_A[tested], kind="stable")]
    # the i-th least p value is held against level / (number not rejected before it)
    fails = p_values_A[order] > level / np.arange(len(order), 0, -1)
    rejected = order[: int(np.argmax(fails))] if fails.any() else order
    columns = (observed_A, all_A, expected_A, p_values_A)
    return [(voters[a], *(float(column[a]) for column in columns)) for a in rejected.tolist()]


def _median_of_others(pairs_N: NDArray[np.intp], seconds_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each vote the median time of the other votes on its pair, NaN where there are none."""
    order = np.lexsort((seconds_N, pairs_N))
    sorted_s = seconds_N[order]
    counts_P = np.bincount(pairs_N)
    starts_N = np.repeat(np.cumsum(counts_P) - counts_P, counts_P)
    others_N = np.repeat(counts_P, counts_P) - 1
    rank_N = np.arange(len(order)) - starts_N

    def other(place_N: NDArray[np.intp]) -> NDArray[np.float64]:
        """The place-th time of the pair when the vote's own is taken out."""
        place_N = np.clip(place_N, 0, np.maximum(others_N - 1, 0))
        return sorted_s[np.minimum(starts_N + place_N + (place_N >= rank_N), len(sorted_s) - 1)]

    medians = np.full(len(order), np.nan)
    if len(order):
        middle = (other((others_N - 1) // 2) + other(others_N // 2)) / 2
        medians[order] = np.where(others_N > 0, middle, np.nan)
    return medians
