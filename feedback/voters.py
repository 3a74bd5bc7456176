"""The two steps of EM on votes: what the states of the pairs say about the voters, and the other way round.

P pairs, A voters, N votes, G values of reliability. states_P3: the probabilities of each pair that a is better, that
neither is, that b is better. A voter names the better side with its reliability; how often it names neither depends
on whether one side is better; where none is, the side it names is a fair coin's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feedback.ballots import Ballots

RELIABILITIES_G = np.linspace(0.025, 0.975, 39)
_LEARNED = 1 / 1.3  # share of the prior that the panel itself gives; the rest is the caller's
_TIE_PRIOR = 10.0  # imagined votes by which a voter's habit of naming neither is held to the panel's


def beta_prior(agree: float, disagree: float) -> NDArray[np.float64]:
    """Beta(agree, disagree) on the grid."""
    log_density_G = (agree - 1) * np.log(RELIABILITIES_G) + (disagree - 1) * np.log1p(-RELIABILITIES_G)
    return _normalised(log_density_G)


@dataclass(frozen=True)
class Voters:
    """What the M step finds.

    reliability_A: posterior means. panel_G: the prior of the next M step, most of it learned from this one.
    tie_better_A, tie_equal_A: rates of naming neither, where one side is better and where none is.
    equal: share of pairs where neither is better, 0 where nobody ever said so.
    """

    reliability_A: NDArray[np.float64]
    panel_G: NDArray[np.float64]
    tie_better_A: NDArray[np.float64]
    tie_equal_A: NDArray[np.float64]
    equal: float

    @classmethod
    def estimate(
        cls,
        ballots: Ballots,
        states_P3: NDArray[np.float64],
        *,
        panel_G: NDArray[np.float64],
        prior_G: NDArray[np.float64],
    ) -> Voters:
        """M step: a posterior for each voter under the panel's prior, then that prior itself, held to `prior_G`."""
        signs_N = ballots.signs_N
        states_N3 = states_P3[ballots.pairs_N]
        agree_A = ballots.sum_A(np.where(signs_N > 0, states_N3[:, 0], (signs_N < 0) * states_N3[:, 2]))
        disagree_A = ballots.sum_A(np.where(signs_N > 0, states_N3[:, 2], (signs_N < 0) * states_N3[:, 0]))
        log_likelihood_AG = np.outer(agree_A, np.log(RELIABILITIES_G)) + np.outer(
            disagree_A, np.log1p(-RELIABILITIES_G)
        )
        posterior_AG = _normalised(log_likelihood_AG + np.log(panel_G))
        if len(posterior_AG):
            panel_G = _LEARNED * posterior_AG.mean(axis=0) + (1 - _LEARNED) * prior_G
        ties_N = signs_N == 0
        if not ties_N.any():
            none_A = np.zeros(len(ballots.voters))
            return cls(posterior_AG @ RELIABILITIES_G, panel_G, none_A, none_A, 0.0)
        return cls(
            posterior_AG @ RELIABILITIES_G,
            panel_G,
            _tie_rates(ballots, ties_N, states_N3[:, 0] + states_N3[:, 2]),
            _tie_rates(ballots, ties_N, states_N3[:, 1]),
            (states_P3[:, 1].sum() + 1) / (len(states_P3) + 2),
        )

    def states(self, ballots: Ballots) -> NDArray[np.float64]:
        """E step: states_P3. Logs of likelihoods, less half the sum of those of a and b."""
        signs_N, voters_N = ballots.signs_N, ballots.voters_N
        right_A, wrong_A = np.log(self.reliability_A), np.log1p(-self.reliability_A)
        for_a_P = ballots.sum_P(signs_N * (right_A - wrong_A)[voters_N]) / 2
        for_equal_P = np.full_like(for_a_P, -np.inf)
        if self.equal:
            coin_A = np.log1p(-self.tie_equal_A) - np.log1p(-self.tie_better_A) + np.log(0.5) - (right_A + wrong_A) / 2
            tie_A = np.log(self.tie_equal_A) - np.log(self.tie_better_A)
            for_equal_P = ballots.sum_P(np.where(signs_N == 0, tie_A[voters_N], coin_A[voters_N]))
            for_equal_P += np.log(self.equal) - np.log((1 - self.equal) / 2)
        return _normalised(np.stack([for_a_P, for_equal_P, -for_a_P], axis=1))


def _tie_rates(ballots: Ballots, ties_N: NDArray[np.bool_], weights_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each voter's share of ties among votes with these weights, shrunk to the panel's."""
    panel = (weights_N[ties_N].sum() + 1) / (weights_N.sum() + 2)
    return (ballots.sum_A(ties_N * weights_N) + _TIE_PRIOR * panel) / (ballots.sum_A(weights_N) + _TIE_PRIOR)


def _normalised(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp of the logs, scaled to a sum of 1 in the last dimension."""
    values = np.exp(logs - logs.max(axis=-1, keepdims=True, initial=-np.inf))
    return values / values.sum(axis=-1, keepdims=True)
