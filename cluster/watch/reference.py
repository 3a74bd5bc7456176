"""What is usual: the first steps of a run, and how far later responses lie from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.watch.signals import Array, Observed

# A signal that is the same in every response of the reference window has no deviation to measure a drift in.
LEAST_DEVIATION = {"length": 1.0, "repetition": 0.02, "sameness": 0.02, "held_out": 0.05, "latent": 0.02}
_LEAST = 1e-3


@dataclass(frozen=True)
class Reference:
    """Means and standard deviations of single responses in the reference window, by signal; `held_out` and `outliers`
    among them. The rest is what those two are measured with."""

    means: dict[str, float]
    deviations: dict[str, float]
    num_groups: int
    reward: tuple[float, float]
    held_out: tuple[float, float] | None
    feature_mean_F: Array
    precision_FF: Array

    def signals(self, observed: Observed) -> dict[str, Array]:
        """Every signal of a batch, one number a response.

        `held_out` is the reward less the mean of the held-out rewards, each in its deviations from the window.
        """
        found = dict(observed.plain)
        if self.held_out is not None and observed.held_out_B is not None:
            found["held_out"] = _standard(observed.reward_B, self.reward) - _standard(
                observed.held_out_B, self.held_out
            )
        found["outliers"] = mahalanobis(observed.features_BF, self.feature_mean_F, self.precision_FF)
        return found

    def drift(self, name: str, values_B: Array) -> float:
        """Mean of a batch less that of the window, in the window's standard deviations; both ways for length."""
        drift = (float(values_B.mean()) - self.means[name]) / self.deviations[name]
        return abs(drift) if name == "length" else drift

    def noise(self, num_groups: int) -> float:
        """Three standard errors of a drift that is none. Responses to one prompt count as one."""
        return float(3 * np.sqrt(1 / num_groups + 1 / self.num_groups))


def reference_of(window: Sequence[Observed]) -> Reference:
    """The reference of some batches."""
    reward_B = np.concatenate([observed.reward_B for observed in window])
    held_out = [observed.held_out_B for observed in window if observed.held_out_B is not None]
    features_BF = np.concatenate([observed.features_BF for observed in window])
    mean_F, precision_FF = shrunk_precision(features_BF)
    measuring = Reference(
        {}, {}, 1, _moments(reward_B), _moments(np.concatenate(held_out)) if held_out else None, mean_F, precision_FF
    )
    by_batch = [measuring.signals(observed) for observed in window]
    known = [name for name in by_batch[0] if all(name in signals for signals in by_batch)]
    together = {name: np.concatenate([signals[name] for signals in by_batch]) for name in known}
    return Reference(
        means={name: float(values.mean()) for name, values in together.items()},
        deviations={
            name: max(float(values.std()), LEAST_DEVIATION.get(name, _LEAST)) for name, values in together.items()
        },
        num_groups=sum(observed.num_groups for observed in window),
        reward=measuring.reward,
        held_out=measuring.held_out,
        feature_mean_F=mean_F,
        precision_FF=precision_FF,
    )


def shrunk_precision(features_BF: Array) -> tuple[Array, Array]:
    """Mean [F] and inverse covariance [F, F], shrunk to its diagonal by F / (B + F): few responses say little about
    how numbers go together. A number without variance counts nothing."""
    num_responses, num_features = features_BF.shape
    mean_F = features_BF.mean(axis=0)
    centred_BF = features_BF - mean_F
    covariance_FF = centred_BF.T @ centred_BF / num_responses
    share = num_features / (num_responses + num_features)
    shrunk_FF = (1 - share) * covariance_FF + share * np.diag(np.diag(covariance_FF))
    varies_F = np.diag(covariance_FF) > 1e-12
    precision_FF = np.zeros_like(shrunk_FF)
    precision_FF[np.ix_(varies_F, varies_F)] = np.linalg.inv(shrunk_FF[np.ix_(varies_F, varies_F)])
    return mean_F, precision_FF


def mahalanobis(features_BF: Array, mean_F: Array, precision_FF: Array) -> Array:
    """[B]: distance of each response from the mean (Mahalanobis 1936)."""
    centred_BF = features_BF - mean_F
    squared_B: Array = np.einsum("bf,fg,bg->b", centred_BF, precision_FF, centred_BF)
    distances: Array = np.sqrt(np.maximum(squared_B, 0.0))
    return distances


def _moments(values_B: Array) -> tuple[float, float]:
    return float(values_B.mean()), max(float(values_B.std()), _LEAST)


def _standard(values_B: Array, moments: tuple[float, float]) -> Array:
    return (values_B - moments[0]) / moments[1]
