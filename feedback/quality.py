"""From votes to one probability a comparison: who can be relied on, and what follows from it.

P pairs, A voters, N votes. A vote's sign is +1 for a, -1 for b and 0 for a tie: half a vote for each side.
A voter counts once a pair; where one voted again, the last vote stands. The order of votes of different
voters changes nothing, and swapping a and b everywhere turns each probability p into 1 - p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from contracts.records import Comparison
from feedback.simulate import Pair, Vote

_SIGNS = {"a": 1.0, "b": -1.0, "tie": 0.0}
_UNDECIDED = 1e-9  # opposite weights that cancel leave the last bits of a sum behind


@dataclass(frozen=True)
class Aggregate:
    """What the votes say together.

    probability_a: by pair id, the probability that response a is the better one.
    reliability: by voter, how often a vote names the better side; below 0.5 votes count inverted.
    votes: by pair id, how many votes a and b got; ties are in neither.
    iterations: EM steps done, 0 for `majority`.
    """

    probability_a: dict[str, float]
    reliability: dict[str, float] = field(default_factory=dict)
    votes: dict[str, tuple[int, int]] = field(default_factory=dict)
    iterations: int = 0


def majority(votes: Iterable[Vote]) -> Aggregate:
    """Every voter counts the same: (votes for a + 1) / (votes + 2), Laplace's rule of succession."""
    ballots = _Ballots.count(votes)
    return ballots.aggregate(ballots.smoothed_majority_P())


def dawid_skene(
    votes: Iterable[Vote],
    *,
    prior_agree: float = 12.0,
    prior_disagree: float = 6.0,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
) -> Aggregate:
    """Probabilities and voter reliabilities by expectation maximisation, one coin a voter.

    Dawid & Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm", with one
    reliability for both sides and even odds a priori, so that a and b are treated alike. The M step takes the mean
    of the Beta posterior, not its mode (Liu, Peng & Ihler 2012, "Variational Inference for Crowdsourcing"): with
    few votes a voter's reliability stays near the prior's mean, all weights are nearly equal and the result is
    the majority's. A mean above 0.5 also says which of the two mirrored solutions is meant.

    Args:
        prior_agree: imagined votes of every voter for the better side.
        prior_disagree: imagined votes for the worse side. 12 and 6 keep a panel without bad voters within a
            point of the majority down to 10 votes each; fewer find hostile voters sooner, at that price.
        max_iterations: EM steps after which the result is returned as it is.
        tolerance: the largest change of a probability that counts as none.

    Raises:
        ValueError: a prior that does not satisfy prior_agree > prior_disagree > 0, or max_iterations below 1.
    """
    if not prior_agree > prior_disagree > 0:
        raise ValueError(
            f"prior_agree is {prior_agree} and prior_disagree {prior_disagree}, "
            "allowed is prior_agree > prior_disagree > 0"
        )
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}, allowed is 1 or more")
    ballots = _Ballots.count(votes)
    probability_P = ballots.smoothed_majority_P()
    iterations, change = 0, np.inf
    while iterations < max_iterations and change >= tolerance:
        log_odds_A = ballots.reliability_log_odds_A(probability_P, prior_agree, prior_disagree)
        before_P, probability_P = probability_P, _sigmoid(ballots.weighted_sum_P(log_odds_A))
        change = np.abs(probability_P - before_P).max(initial=0.0)
        iterations += 1
    return ballots.aggregate(probability_P, _sigmoid(log_odds_A), iterations)


def comparisons(pairs: Sequence[Pair], aggregate: Aggregate) -> tuple[list[Comparison], dict[str, int]]:
    """The likelier side of each pair as `chosen`, with a probability above 0.5, in the order of `pairs`.

    Returns:
        The comparisons, and how many pairs were left out by reason: "empty" (a blank side), "identical" (texts
        equal but for outer white space), "no votes", "undecided" (probability 0.5).
    """
    kept = []
    dropped: Counter[str] = Counter()
    for pair in pairs:
        reason = _unusable(pair, aggregate)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(_comparison(pair, aggregate))
    return kept, dict(dropped)


def _unusable(pair: Pair, aggregate: Aggregate) -> str:
    sides = {pair.response_a.strip(), pair.response_b.strip()}
    if "" in sides:
        return "empty"
    if len(sides) == 1:
        return "identical"
    if pair.pair_id not in aggregate.probability_a:
        return "no votes"
    return "undecided" if abs(aggregate.probability_a[pair.pair_id] - 0.5) < _UNDECIDED else ""


def _comparison(pair: Pair, aggregate: Aggregate) -> Comparison:
    probability = aggregate.probability_a[pair.pair_id]
    votes = aggregate.votes.get(pair.pair_id, (0, 0))
    chosen, rejected = pair.response_a, pair.response_b
    if probability < 0.5:
        chosen, rejected, probability, votes = rejected, chosen, 1 - probability, votes[::-1]
    return Comparison(
        prompt=pair.prompt,
        chosen=chosen,
        rejected=rejected,
        prompt_id=pair.prompt_id,
        domain=pair.domain,
        probability=probability,
        votes_chosen=votes[0],
        votes_rejected=votes[1],
    )


@dataclass(frozen=True)
class _Ballots:
    """Votes as arrays: vote n is about pair `pairs_N[n]`, by voter `voters_N[n]`, with `signs_N[n]`."""

    pair_ids: list[str]
    voters: list[str]
    pairs_N: NDArray[np.intp]
    voters_N: NDArray[np.intp]
    signs_N: NDArray[np.float64]

    @classmethod
    def count(cls, votes: Iterable[Vote]) -> _Ballots:
        latest = {(vote.pair_id, vote.voter): _SIGNS[vote.choice] for vote in votes}
        # sorted: sums run in one order, whatever order the votes came in
        keys = sorted(latest)
        pair_ids = sorted({pair_id for pair_id, _ in keys})
        voters = sorted({voter for _, voter in keys})
        pair_index = {pair_id: index for index, pair_id in enumerate(pair_ids)}
        voter_index = {voter: index for index, voter in enumerate(voters)}
        return cls(
            pair_ids,
            voters,
            np.array([pair_index[pair_id] for pair_id, _ in keys], dtype=np.intp),
            np.array([voter_index[voter] for _, voter in keys], dtype=np.intp),
            np.array([latest[key] for key in keys], dtype=np.float64),
        )

    def _sum_P(self, values_N: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self.pairs_N, weights=values_N, minlength=len(self.pair_ids)).astype(np.float64)

    def smoothed_majority_P(self) -> NDArray[np.float64]:
        votes_P = self._sum_P(np.ones_like(self.signs_N))
        return (self._sum_P((1 + self.signs_N) / 2) + 1) / (votes_P + 2)

    def reliability_log_odds_A(
        self, probability_P: NDArray[np.float64], prior_agree: float, prior_disagree: float
    ) -> NDArray[np.float64]:
        """M step: log odds of the posterior mean, agreements over disagreements with the prior's among them."""
        agree_N = (1 + self.signs_N * (2 * probability_P[self.pairs_N] - 1)) / 2
        size = len(self.voters)
        agree_A = np.bincount(self.voters_N, weights=agree_N, minlength=size) + prior_agree
        disagree_A = np.bincount(self.voters_N, weights=1 - agree_N, minlength=size) + prior_disagree
        return np.log(agree_A) - np.log(disagree_A)

    def weighted_sum_P(self, log_odds_A: NDArray[np.float64]) -> NDArray[np.float64]:
        """E step: log odds that a is better. A tie has sign 0 and speaks for neither side."""
        return self._sum_P(self.signs_N * log_odds_A[self.voters_N])

    def aggregate(
        self, probability_P: NDArray[np.float64], reliability_A: NDArray[np.float64] | None = None, iterations: int = 0
    ) -> Aggregate:
        for_a = self._sum_P(np.maximum(self.signs_N, 0)).astype(int).tolist()
        for_b = self._sum_P(np.maximum(-self.signs_N, 0)).astype(int).tolist()
        return Aggregate(
            dict(zip(self.pair_ids, probability_P.tolist(), strict=True)),
            {} if reliability_A is None else dict(zip(self.voters, reliability_A.tolist(), strict=True)),
            dict(zip(self.pair_ids, zip(for_a, for_b, strict=True), strict=True)),
            iterations,
        )


def _sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -log_odds))  # never overflows
