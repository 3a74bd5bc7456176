"""From votes to one probability a comparison: who can be relied on, and what follows from it.

P pairs, A voters, N votes. A voter counts once a pair; where one voted again, the last vote stands. The order of
votes of different voters changes nothing, and swapping a and b everywhere turns each probability p into 1 - p.
Neither a tie nor "both bad" names a better side: both are votes for a probability of one half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from contracts.records import Comparison
from feedback.ballots import BOTH_BAD, A, B, Ballots
from feedback.simulate import Choice, Pair, Vote
from feedback.voters import Voters, beta_prior

_UNDECIDED = 1e-9  # opposite weights that cancel leave the last bits of a sum behind
_GOLD: dict[str, tuple[float, float, float]] = {
    "a": (1, 0, 0),
    "tie": (0, 1, 0),
    "both_bad": (0, 1, 0),
    "b": (0, 0, 1),
}


@dataclass(frozen=True)
class Aggregate:
    """What the votes say together.

    probability_a: by pair id, the probability that response a is the better one; where the two may be equal, half of
        that counts. Exactly 0.5 where nothing speaks for either side.
    reliability: by voter, how often a vote that names a side names the better one; below 0.5 votes count inverted.
    votes: by pair id, how many votes a and b got; ties and "both bad" are in neither.
    iterations: EM steps done, 0 for `majority`.
    probability_equal: by pair id, the probability that neither response is better; empty where nobody voted so.
    both_bad: by pair id, how many votes said that both are bad; pairs without are left out.
    tie_rates: by voter, how often it votes for neither (where one side is better, where they are equal).
    """

    probability_a: dict[str, float]
    reliability: dict[str, float] = field(default_factory=dict)
    votes: dict[str, tuple[int, int]] = field(default_factory=dict)
    iterations: int = 0
    probability_equal: dict[str, float] = field(default_factory=dict)
    both_bad: dict[str, int] = field(default_factory=dict)
    tie_rates: dict[str, tuple[float, float]] = field(default_factory=dict)


def majority(votes: Iterable[Vote] | Ballots) -> Aggregate:
    """Every voter counts the same: (votes for a + 1) / (votes + 2), Laplace's rule of succession."""
    ballots = Ballots.of(votes)
    for_a_P = ballots.sum_P((1 + ballots.signs_N) / 2)
    return Aggregate(
        _by_pair(ballots, (for_a_P + 1) / (ballots.sum_P(np.ones(len(ballots.pairs_N))) + 2)),
        votes=_votes(ballots),
        both_bad=_both_bad(ballots),
    )


def dawid_skene(
    votes: Iterable[Vote] | Ballots,
    *,
    gold: Mapping[str, Choice] | None = None,
    prior_agree: float = 4.0,
    prior_disagree: float = 2.0,
    max_iterations: int = 500,
    tolerance: float = 1e-4,
) -> Aggregate:
    """Probabilities and voter reliabilities by expectation maximisation, one coin a voter.

    Dawid & Skene 1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm", with one
    reliability for both sides and even odds a priori, so that a and b are treated alike. The M step takes the mean
    of a voter's posterior, not its mode (Liu, Peng & Ihler 2012, "Variational Inference for Crowdsourcing"), under a
    prior that the panel shares and that is learned with it (Kiefer & Wolfowitz 1956, "Consistency of the Maximum
    Likelihood Estimator in the Presence of Infinitely Many Incidental Parameters"), mixed with Beta(prior_agree,
    prior_disagree). So a voter with few votes is taken as one of this panel: where all are alike, all weights are
    and the result is the majority's. A prior above 0.5 also says which of the two mirrored solutions is meant.

    Where somebody voted tie or both bad, a pair has a third state, equal. A voter then names a side with a
    probability of its own that depends on that state alone, and where the responses are equal by a fair coin; so
    many ties bring a probability near 0.5, and few of them cost nobody reliability.

    Args:
        gold: pairs whose answer is known, "a", "b", "tie" or "both_bad": their votes are counted as right or wrong
            for certain, which adds them to the priors of those who voted, and their probability is the answer's.
        prior_agree: with prior_disagree, the parameters of the Beta distribution of reliabilities before any vote.
        prior_disagree: less than prior_agree: most people are right more often than not.
        max_iterations: EM steps after which the result is returned as it is.
        tolerance: the largest change of a probability that counts as none.

    Raises:
        ValueError: a prior that does not satisfy prior_agree > prior_disagree > 0, max_iterations below 1, or an
            unknown gold answer.
    """
    if not prior_agree > prior_disagree > 0:
        raise ValueError(
            f"prior_agree is {prior_agree} and prior_disagree {prior_disagree}, "
            "allowed is prior_agree > prior_disagree > 0"
        )
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}, allowed is 1 or more")
    ballots = Ballots.of(votes)
    known_P, answers_P3 = _gold(ballots, gold or {})
    prior_G = panel_G = beta_prior(prior_agree, prior_disagree)
    states_P3 = _initial(ballots)
    states_P3[known_P] = answers_P3[known_P]
    if known_P.any():
        # the majority may be wrong, gold is not: what it says of the voters is where the search begins
        checks = ballots.select(known_P[ballots.pairs_N])
        states_P3 = Voters.estimate(checks, states_P3, panel_G=panel_G, prior_G=prior_G).states(ballots)
        states_P3[known_P] = answers_P3[known_P]
    iterations, change = 0, np.inf
    while iterations < max_iterations and change >= tolerance:
        voters = Voters.estimate(ballots, states_P3, panel_G=panel_G, prior_G=prior_G)
        panel_G = voters.panel_G
        before_P3, states_P3 = states_P3, voters.states(ballots)
        states_P3[known_P] = answers_P3[known_P]
        change = np.abs(states_P3 - before_P3).max(initial=0.0)
        iterations += 1
    return _aggregate(ballots, states_P3, voters, iterations)


def predicted_choices(aggregate: Aggregate, pair_ids: Sequence[str], voters: Sequence[str]) -> NDArray[np.float64]:
    """(N, 3): the probabilities that this voter would say a, neither, b about this pair, by `dawid_skene`.

    A pair or a voter without votes is taken as the average one.
    """
    equal = aggregate.probability_equal
    mean_equal = float(np.mean(list(equal.values()))) if equal else 0.0
    p_equal_N = np.array([equal.get(pair, mean_equal) for pair in pair_ids])
    p_a_N = np.array([aggregate.probability_a.get(pair, 0.5) for pair in pair_ids]) - p_equal_N / 2
    mean_right = float(np.mean(list(aggregate.reliability.values()) or [0.5]))
    right_N = np.array([aggregate.reliability.get(voter, mean_right) for voter in voters])
    mean_ties = np.mean(list(aggregate.tie_rates.values()), axis=0) if aggregate.tie_rates else np.zeros(2)
    ties_N2 = np.array([aggregate.tie_rates.get(voter, mean_ties) for voter in voters]).reshape(-1, 2)
    p_b_N = 1 - p_a_N - p_equal_N
    names_N = 1 - ties_N2[:, 0]
    fair_N = p_equal_N * (1 - ties_N2[:, 1]) / 2
    a_N = names_N * (p_a_N * right_N + p_b_N * (1 - right_N)) + fair_N
    b_N = names_N * (p_b_N * right_N + p_a_N * (1 - right_N)) + fair_N
    return np.stack([a_N, 1 - a_N - b_N, b_N], axis=1)


def comparisons(pairs: Sequence[Pair], aggregate: Aggregate) -> tuple[list[Comparison], dict[str, int]]:
    """The likelier side of each pair as `chosen`, in the order of `pairs`; a tie stays one, with probability 0.5.

    Returns:
        The comparisons, and how many pairs were left out by reason: "empty" (a blank side), "identical" (texts
        equal but for outer white space), "no votes".
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


@dataclass(frozen=True)
class UnpairedLabel:
    """One response by itself: good or bad, with the votes that said so."""

    prompt: str
    response: str
    good: bool
    prompt_id: str
    votes: int
    of_votes: int
    domain: str = ""


def unpaired_labels(pairs: Sequence[Pair], votes: Iterable[Vote] | Ballots) -> list[UnpairedLabel]:
    """Both responses as bad wherever more than half of a pair's votes say so; in the order of `pairs`.

    "a is better" does not say that a is good, so no other vote becomes a label.
    """
    ballots = Ballots.of(votes)
    bad_P = ballots.counts_P(BOTH_BAD).tolist()
    all_P = ballots.sum_P(np.ones(len(ballots.pairs_N))).astype(int).tolist()
    bad = {name: (bad, of) for name, bad, of in zip(ballots.pair_ids, bad_P, all_P, strict=True) if 2 * bad > of}
    return [
        UnpairedLabel(pair.prompt, response, False, pair.prompt_id, *bad[pair.pair_id])
        for pair in pairs
        if pair.pair_id in bad
        for response in (pair.response_a, pair.response_b)
        if response.strip()
    ]


def _unusable(pair: Pair, aggregate: Aggregate) -> str:
    sides = {pair.response_a.strip(), pair.response_b.strip()}
    if "" in sides:
        return "empty"
    if len(sides) == 1:
        return "identical"
    return "" if pair.pair_id in aggregate.probability_a else "no votes"


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


def _initial(ballots: Ballots) -> NDArray[np.float64]:
    """states_P3, the probabilities that a, neither or b is better: smoothed shares of votes."""
    signs_N = ballots.signs_N
    counts_P3 = np.stack([ballots.sum_P(signs_N > 0), ballots.sum_P(signs_N == 0), ballots.sum_P(signs_N < 0)], axis=1)
    counts_P3 += np.array([1.0, float((signs_N == 0).any()), 1.0])
    return counts_P3 / counts_P3.sum(axis=1, keepdims=True)


def _gold(ballots: Ballots, gold: Mapping[str, Choice]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    for pair_id, answer in gold.items():
        if answer not in _GOLD:
            raise ValueError(f"gold answer of pair {pair_id!r} is {answer!r}, allowed is {', '.join(_GOLD)}")
    known_P = np.array([pair_id in gold for pair_id in ballots.pair_ids], dtype=bool)
    answers = [_GOLD[gold.get(pair_id, "tie")] for pair_id in ballots.pair_ids]
    return known_P, np.array(answers, dtype=np.float64).reshape(-1, 3)


def _aggregate(ballots: Ballots, states_P3: NDArray[np.float64], voters: Voters, iterations: int) -> Aggregate:
    ties = voters.equal > 0
    rates_A2 = zip(voters.tie_better_A.tolist(), voters.tie_equal_A.tolist(), strict=True)
    return Aggregate(
        _by_pair(ballots, states_P3[:, 0] + states_P3[:, 1] / 2),
        dict(zip(ballots.voters, voters.reliability_A.tolist(), strict=True)),
        _votes(ballots),
        iterations,
        dict(zip(ballots.pair_ids, states_P3[:, 1].tolist(), strict=True)) if ties else {},
        _both_bad(ballots),
        dict(zip(ballots.voters, rates_A2, strict=True)) if ties else {},
    )


def _by_pair(ballots: Ballots, probability_P: NDArray[np.float64]) -> dict[str, float]:
    exact_P = np.where(np.abs(probability_P - 0.5) < _UNDECIDED, 0.5, probability_P)
    return dict(zip(ballots.pair_ids, exact_P.tolist(), strict=True))


def _votes(ballots: Ballots) -> dict[str, tuple[int, int]]:
    for_a, for_b = ballots.counts_P(A).tolist(), ballots.counts_P(B).tolist()
    return dict(zip(ballots.pair_ids, zip(for_a, for_b, strict=True), strict=True))


def _both_bad(ballots: Ballots) -> dict[str, int]:
    return {name: n for name, n in zip(ballots.pair_ids, ballots.counts_P(BOTH_BAD).tolist(), strict=True) if n}
