"""How the members of a reward ensemble become one reward.

B responses, K members.
"""

from __future__ import annotations

from collections.abc import Sequence

from contracts.config import EnsembleRule


def ensemble_rewards(
    members_BK: Sequence[Sequence[float]], std_B: Sequence[float], *, rule: EnsembleRule, std_weight: float
) -> list[float]:
    """[B]: mean, minimum, or mean less `std_weight` standard deviations.

    Coste et al. 2024, "Reward model ensembles help mitigate overoptimization", section 3: mean, worst-case and
    uncertainty-weighted optimisation, the last with the deviation in the place of the variance, so that the weight has
    no unit.
    """
    means = [sum(members) / len(members) for members in members_BK]
    match rule:
        case "mean":
            return means
        case "minimum":
            return [min(members) for members in members_BK]
        case "mean_minus_std":
            return [mean - std_weight * std for mean, std in zip(means, std_B, strict=True)]
