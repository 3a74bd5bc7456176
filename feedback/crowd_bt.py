"""Bradley-Terry with annotator skill and position bias: strengths from votes of people of unlike care.

P pairs, A voters, N votes, I items, M rows: a vote that names a side is one row, any other two of weight one half.
Chen, Bennett, Collins-Thompson & Horvitz 2013, "Pairwise Ranking Aggregation in a Crowdsourced Setting" (Crowd-BT),
eq. 4: a voter with skill η picks a with η · σ(s_a - s_b) + (1 - η) · σ(s_b - s_a). Here the side that is shown left
gets β more within both σ, whatever is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feedback.ballots import Ballots
from feedback.simulate import Vote


@dataclass(frozen=True)
class CrowdBradleyTerry:
    """What the model finds.

    probability_a: by pair id, the probability that a voter with perfect skill, for whom position does not count,
        picks a: a soft target.
    skill: by voter, η; below 0.5 votes count inverted.
    strength: by item, the mean of all is 0.
    position_bias: β, log odds for the left side of two equal responses; 0.0 where nobody knows what was left.
    position_bias_error: its standard error, given the skills.
    iterations: EM steps done.
    """

    probability_a: dict[str, float]
    skill: dict[str, float]
    strength: dict[str, float]
    position_bias: float
    position_bias_error: float
    iterations: int


def crowd_bradley_terry(
    votes: Iterable[Vote] | Ballots,
    items: Mapping[str, tuple[str, str]] | None = None,
    *,
    strength_std: float = 1.5,
    bias_std: float = 1.0,
    prior_agree: float = 12.0,
    prior_disagree: float = 2.0,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
) -> CrowdBradleyTerry:
    """Posterior modes of strengths and position bias, means of skills, by EM.

    The E step asks of each vote whether its voter followed the strengths or turned them round; the M step does one
    Newton step in strengths and bias (conjugate gradients, for the Hessian is sparse) and counts for the skills.

    Args:
        items: by pair id, what was compared, as (a, b); an item in several pairs has one strength in all of them.
            Default: each pair's two responses by themselves.
        strength_std: of the normal prior of a strength.
        bias_std: of the normal prior of the bias.
        prior_agree: with prior_disagree, the Beta prior of skills. Strengths already leave room for good voters to
            disagree, so it lies higher than that of `dawid_skene`.
        max_iterations: EM steps after which the result is returned as it is.
        tolerance: the largest change of a strength or the bias that counts as none.

    Raises:
        ValueError: a pair that `items` does not have.
    """
    ballots = Ballots.of(votes)
    rows = _Rows.of(ballots, items)
    precision = np.append(np.full(len(rows.items), strength_std**-2.0), bias_std**-2.0)
    theta = np.zeros(len(precision))  # strengths, then β
    skill_A = np.full(len(ballots.voters), prior_agree / (prior_agree + prior_disagree))
    iterations, change = 0, np.inf
    while iterations < max_iterations and change >= tolerance:
        follows_M = rows.follows(theta, skill_A)
        step = rows.newton_step(theta, follows_M, precision)
        theta = theta + step
        change = np.abs(step).max(initial=0.0)
        follows_A = np.bincount(rows.voters_M, weights=rows.weights_M * follows_M, minlength=len(skill_A))
        all_A = np.bincount(rows.voters_M, weights=rows.weights_M, minlength=len(skill_A))
        skill_A = (follows_A + prior_agree) / (all_A + prior_agree + prior_disagree)
        iterations += 1
    known = bool((rows.left_M != 0).any())
    margin_P = theta[rows.item_a_P] - theta[rows.item_b_P]
    return CrowdBradleyTerry(
        dict(zip(ballots.pair_ids, _sigmoid(margin_P).tolist(), strict=True)),
        dict(zip(ballots.voters, skill_A.tolist(), strict=True)),
        dict(zip(rows.items, (theta[:-1] - theta[:-1].mean()).tolist(), strict=True)) if rows.items else {},
        float(theta[-1]) if known else 0.0,
        rows.bias_error(theta, rows.follows(theta, skill_A), precision) if known else 0.0,
        iterations,
    )


@dataclass(frozen=True)
class _Rows:
    """choice_M: 1 for a, -1 for b; left_M: 1 where a was shown left, -1 where b was, 0 unknown."""

    items: list[str]
    item_a_P: NDArray[np.intp]
    item_b_P: NDArray[np.intp]
    pairs_M: NDArray[np.intp]
    voters_M: NDArray[np.intp]
    choice_M: NDArray[np.float64]
    left_M: NDArray[np.float64]
    weights_M: NDArray[np.float64]

    @classmethod
    def of(cls, ballots: Ballots, items: Mapping[str, tuple[str, str]] | None) -> _Rows:
        if items is None:
            items = {pair: (f"{pair}/a", f"{pair}/b") for pair in ballots.pair_ids}
        missing = [pair for pair in ballots.pair_ids if pair not in items]
        if missing:
            raise ValueError(f"items has no pair {missing[0]!r}, nor {len(missing) - 1} others that were voted on")
        names = sorted({name for pair in ballots.pair_ids for name in items[pair]})
        index = {name: number for number, name in enumerate(names)}
        sides = np.array([[index[name] for name in items[pair]] for pair in ballots.pair_ids], dtype=np.intp)
        sides = sides.reshape(-1, 2)
        signs_N = ballots.signs_N
        twice_M = np.concatenate([np.arange(len(signs_N)), np.flatnonzero(signs_N == 0)])
        choice_M = np.concatenate([np.where(signs_N == 0, 1.0, signs_N), np.full((signs_N == 0).sum(), -1.0)])
        return cls(
            names,
            sides[:, 0],
            sides[:, 1],
            ballots.pairs_N[twice_M],
            ballots.voters_N[twice_M],
            choice_M,
            ballots.left_N[twice_M],
            np.where(signs_N[twice_M] == 0, 0.5, 1.0),
        )

    def logits(self, theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log odds of a from a voter that follows the strengths, and from one that turns them round."""
        margin_M = (theta[self.item_a_P] - theta[self.item_b_P])[self.pairs_M]
        return margin_M + theta[-1] * self.left_M, -margin_M + theta[-1] * self.left_M

    def follows(self, theta: NDArray[np.float64], skill_A: NDArray[np.float64]) -> NDArray[np.float64]:
        """E step: the probability that each row's voter followed the strengths."""
        follow_M, turn_M = (_sigmoid(self.choice_M * logit_M) for logit_M in self.logits(theta))
        skill_M = skill_A[self.voters_M]
        return skill_M * follow_M / (skill_M * follow_M + (1 - skill_M) * turn_M)

    def newton_step(
        self, theta: NDArray[np.float64], follows_M: NDArray[np.float64], precision: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        picked_a_M = (1 + self.choice_M) / 2
        follow_M, turn_M = (picked_a_M - _sigmoid(logit_M) for logit_M in self.logits(theta))
        follow_M, turn_M = self.weights_M * follows_M * follow_M, self.weights_M * (1 - follows_M) * turn_M
        gradient = self._spread(follow_M - turn_M, follow_M + turn_M) - precision * theta
        return self._solve(theta, follows_M, precision, gradient)

    def bias_error(
        self, theta: NDArray[np.float64], follows_M: NDArray[np.float64], precision: NDArray[np.float64]
    ) -> float:
        one = np.zeros(len(theta))
        one[-1] = 1.0
        return float(np.sqrt(self._solve(theta, follows_M, precision, one)[-1]))

    def _spread(self, by_margin_M: NDArray[np.float64], by_left_M: NDArray[np.float64]) -> NDArray[np.float64]:
        """Derivatives by margin and by (left times) bias, added up for each strength and the bias."""
        by_margin_P = np.bincount(self.pairs_M, weights=by_margin_M, minlength=len(self.item_a_P))
        size = len(self.items)
        for_a_I = np.bincount(self.item_a_P, weights=by_margin_P, minlength=size)
        for_b_I = np.bincount(self.item_b_P, weights=by_margin_P, minlength=size)
        return np.append(for_a_I - for_b_I, by_left_M @ self.left_M)

    def _solve(
        self,
        theta: NDArray[np.float64],
        follows_M: NDArray[np.float64],
        precision: NDArray[np.float64],
        right: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """(Hessian of the M step's loss)⁻¹ · right, by conjugate gradients (Hestenes & Stiefel 1952)."""
        follow_M, turn_M = (_sigmoid(logit_M) * _sigmoid(-logit_M) for logit_M in self.logits(theta))
        follow_M, turn_M = self.weights_M * follows_M * follow_M, self.weights_M * (1 - follows_M) * turn_M

        def hessian_times(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            margin_M = (vector[self.item_a_P] - vector[self.item_b_P])[self.pairs_M]
            bias_M = vector[-1] * self.left_M
            same_M, other_M = follow_M * (margin_M + bias_M), turn_M * (bias_M - margin_M)
            return self._spread(same_M - other_M, same_M + other_M) + precision * vector

        solution = np.zeros_like(right)
        residual = direction = right
        size = start = residual @ residual
        for _ in range(len(right)):
            if size <= 1e-16 * start:
                break
            product = hessian_times(direction)
            length = size / (direction @ product)
            solution, residual = solution + length * direction, residual - length * product
            size, before = residual @ residual, size
            direction = residual + size / before * direction
        return solution


def _sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -log_odds))  # never overflows
