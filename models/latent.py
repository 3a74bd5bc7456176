"""What the features of a reward model's training data look like, and how far from them a response lies.

N responses, H hidden size, D directions. The feature of a response is the reward head's input: the last hidden state at
its last token. The distance is Mahalanobis' under one Gaussian (Lee et al. 2018, "A simple unified framework for
detecting out-of-distribution samples and adversarial attacks", section 2, with the training data as the only class).
Responses of an over-optimised policy become outliers of such features (Miao et al. 2024, "InfoRM", section 5, whose
features are those of an information bottleneck). numpy alone, so that a file can be checked before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

Array = NDArray[np.float64]

FILE = "latent.safetensors"  # beside the weights, in no file of theirs: transformers reads model*.safetensors
MAX_DIRECTIONS = 64
LEAST_ROWS = 16  # fewer responses say nothing about what is usual
_FOLDS = 4
_LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class TypicalFeatures:
    """A Gaussian: `variances_D` along orthonormal `directions_DH`, `rest_variance` in every direction across them.

    Variances are in units in which a response like those it was fitted on, but not one of them, has distance 1 on
    average.
    """

    mean_H: Array
    directions_DH: Array
    variances_D: Array
    rest_variance: float

    @classmethod
    def fit(cls, features_NH: Array, groups_N: NDArray[np.int64], *, max_directions: int = MAX_DIRECTIONS) -> Self:
        """Mean and shrunk covariance of the features, in the units of responses that a fit has not seen.

        Rows of one group, the two answers of a pair, are like each other: neither judges a fit that saw the other.
        In-sample distances would be too short by far where there are fewer rows than features.

        Raises:
            ValueError: fewer than LEAST_ROWS rows or two groups, or a feature that is not finite.
        """
        features_NH = np.asarray(features_NH, dtype=np.float64)
        groups = np.unique(groups_N)
        if len(features_NH) < LEAST_ROWS or len(groups) < 2:
            raise ValueError(
                f"{len(features_NH)} rows of {len(groups)} groups, needed are {LEAST_ROWS} rows of 2 groups"
            )
        if not np.isfinite(features_NH).all():
            raise ValueError("a feature is not finite")
        folds_N = np.searchsorted(groups, groups_N) % _FOLDS
        unseen = [
            cls._gaussian(features_NH[folds_N != fold], max_directions).distances(features_NH[folds_N == fold])
            for fold in np.unique(folds_N)
        ]
        unit = max(float(np.concatenate(unseen).mean()), _LEAST_VARIANCE)
        found = cls._gaussian(features_NH, max_directions)
        return cls(found.mean_H, found.directions_DH, found.variances_D * unit**2, found.rest_variance * unit**2)

    @classmethod
    def _gaussian(cls, features_NH: Array, max_directions: int) -> Self:
        """Variances beyond `max_directions` become their mean (Tipping & Bishop 1999, "Probabilistic principal
        component analysis", equation 8)."""
        num_rows, num_features = features_NH.shape
        mean_H = features_NH.mean(axis=0)
        centred_NH = features_NH - mean_H
        share = shrinkage(centred_NH)
        _, singular, directions_NH = np.linalg.svd(centred_NH, full_matrices=False)
        variances_N = singular**2 / num_rows
        target = float(variances_N.sum()) / num_features
        shrunk_N = np.maximum((1 - share) * variances_N + share * target, _LEAST_VARIANCE)
        kept = min(max_directions, num_rows - 1, num_features)
        # The covariance has no more variances than there are rows or features; the others are shrunk from 0.
        unseen = num_features - len(shrunk_N)
        rest = float(shrunk_N[kept:].sum()) + unseen * share * target
        rest_variance = rest / (num_features - kept) if num_features > kept else 1.0
        return cls(mean_H, directions_NH[:kept], shrunk_N[:kept], max(rest_variance, _LEAST_VARIANCE))

    def distances(self, features_NH: Array) -> Array:
        """[N], about 1 for responses like those of the training data."""
        centred_NH = np.asarray(features_NH, dtype=np.float64) - self.mean_H
        along_ND = centred_NH @ self.directions_DH.T
        across_N = np.maximum((centred_NH**2).sum(axis=1) - (along_ND**2).sum(axis=1), 0.0)
        squared_N: Array = (along_ND**2 / self.variances_D).sum(axis=1) + across_N / self.rest_variance
        distances_N: Array = np.sqrt(squared_N)
        return distances_N

    def save(self, folder: Path) -> None:
        """Write FILE: float32 `mean` [H], `directions` [D, H], `variances` [D], `rest_variance` [1]."""
        tensors = {
            "mean": self.mean_H,
            "directions": self.directions_DH,
            "variances": self.variances_D,
            "rest_variance": np.array([self.rest_variance]),
        }
        # A view of reversed or transposed memory would be written as it lies there.
        save_file({name: np.ascontiguousarray(each, dtype=np.float32) for name, each in tensors.items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path, *, hidden_size: int) -> Self | None:
        """What `save` wrote; None where a reward model has no such file, one trained before there were any.

        Raises:
            ValueError: it is damaged, or of features of another width than this model's.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            tensors = {name: each.astype(np.float64) for name, each in load_file(file).items()}
            mean_H, directions_DH = tensors["mean"], tensors["directions"]
            variances_D, (rest_variance,) = tensors["variances"], tensors["rest_variance"]
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())}); {_REMEDY}") from error
        if mean_H.shape != (hidden_size,):
            raise ValueError(f"{file}: is of {mean_H.size} features, this model has {hidden_size}; {_REMEDY}")
        if directions_DH.shape != (variances_D.size, hidden_size) or variances_D.ndim != 1:
            raise ValueError(f"{file}: {variances_D.shape} variances of {directions_DH.shape} directions; {_REMEDY}")
        finite = all(np.isfinite(each).all() for each in tensors.values())
        if not finite or variances_D.min(initial=1.0) <= 0 or rest_variance <= 0:
            raise ValueError(f"{file}: a number in it is not finite or a variance not above 0; {_REMEDY}")
        return cls(mean_H, directions_DH, variances_D, float(rest_variance))


_REMEDY = "put back the one that the reward model was trained with, or remove it and do without its alarm"


def shrinkage(centred_NH: Array) -> float:
    """How far to shrink a covariance to a multiple of the identity, from 0 to 1, without forming it: b² / d² of Ledoit
    & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.2."""
    num_rows, num_features = centred_NH.shape
    gram_NN = centred_NH @ centred_NH.T
    squared = float((gram_NN**2).sum()) / num_rows**2  # sum of squares of the covariance's entries
    mean = float(np.trace(gram_NN)) / (num_rows * num_features)
    d2 = squared / num_features - mean**2
    b2 = (float((np.diag(gram_NN) ** 2).sum()) / num_rows - squared) / (num_rows * num_features)
    return min(max(b2, 0.0) / d2, 1.0) if d2 > _LEAST_VARIANCE**2 else 1.0
