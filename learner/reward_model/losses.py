"""Losses of a reward model: tensors in, a scalar out.

B pairs or labels, L rows of the score head. Arguments with B alone may have any shapes that broadcast, [B, 1] against
[B, L] say. Nothing is divided but by the counts that are passed in, so that micro-batches and ranks add up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def target(probabilities_B: Tensor, *, label_smoothing: float = 0.0, flip_rate: float = 0.0) -> Tensor:
    """The target of a logistic loss in place of the probability that the votes give.

    label_smoothing e: p (1 - 2 e) + e, what a clean label is expected to say after a flip with probability e (Mitchell
    2023, "A note on DPO with noisy preferences and relationship to IPO"): scores stay moderate.

    flip_rate e: (p - e) / (1 - 2 e), its inverse, outside of [0, 1] for sure labels. As the loss is linear in p, its
    expectation over flips with probability e is the loss at the clean p: an unbiased estimate (Natarajan et al. 2013,
    "Learning with Noisy Labels", lemma 1; Chowdhury et al. 2024, "Provably Robust DPO", eq. 12). It has no lower bound,
    so that small data sets want few epochs.

    Raises:
        ValueError: either is not in [0, 0.5).
    """
    for name, value in (("label_smoothing", label_smoothing), ("flip_rate", flip_rate)):
        if not 0 <= value < 0.5:
            raise ValueError(f"{name} is {value}, allowed is 0 or more and less than 0.5")
    smoothed_B = probabilities_B * (1 - 2 * label_smoothing) + label_smoothing
    return (smoothed_B - flip_rate) / (1 - 2 * flip_rate)


def bradley_terry_loss(
    margins_B: Tensor,
    probabilities_B: Tensor,
    *,
    num_pairs: float,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    flip_rate: float = 0.0,
    weights_B: Tensor | None = None,
) -> Tensor:
    """-Σ w [t log σ(d - m) + (1 - t) log σ(m - d)] / num_pairs, in nats, a scalar.

    margins_B: d, score of chosen less score of rejected. probabilities_B: p, that chosen is better; 0.5 is a tie.
    t: `target` of p. m: margin · (2 p - 1), which asks the better side to win by more the surer the votes are, and
    nothing of a tie (Touvron et al. 2023, "Llama 2", eq. 2, with the rating's strength taken from the votes).
    num_pairs: pairs in the optimizer step. weights_B: w, 1 each where not given.

    Bradley & Terry 1952; Christiano et al. 2017, "Deep RL from human preferences", eq. 1.
    """
    shifted_B = margins_B - margin * (2 * probabilities_B - 1)
    targets_B = target(probabilities_B, label_smoothing=label_smoothing, flip_rate=flip_rate)
    return _logistic(shifted_B, targets_B, weights_B) / num_pairs


def label_loss(
    scores_B: Tensor,
    labels_B: Tensor,
    *,
    num_labels: float,
    class_weights: tuple[float, float] = (1.0, 1.0),
    label_smoothing: float = 0.0,
    flip_rate: float = 0.0,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Sigmoid cross-entropy of single responses: -Σ w c [t log σ(s) + (1 - t) log σ(-s)] / num_labels, a scalar.

    scores_B: s, not normalised. labels_B: 1 good, 0 bad; t their `target`. class_weights: c of bad and of good ones.
    num_labels: labels in the optimizer step.
    """
    bad, good = class_weights
    by_class_B = bad + (good - bad) * labels_B
    targets_B = target(labels_B, label_smoothing=label_smoothing, flip_rate=flip_rate)
    return _logistic(scores_B, targets_B, by_class_B if weights_B is None else weights_B * by_class_B) / num_labels


def balanced_class_weights(labels: Tensor) -> tuple[float, float]:
    """N / (2 N_bad) and N / (2 N_good): both classes weigh the same in sum, and a label 1 on average.

    King & Zeng 2001, "Logistic Regression in Rare Events Data", section 4.2, at a population share of one half.

    Raises:
        ValueError: one class alone.
    """
    good = int((labels == 1).sum())
    bad = labels.numel() - good
    if not good or not bad:
        raise ValueError(f"{good} good and {bad} bad labels: a reward model needs both")
    return labels.numel() / (2 * bad), labels.numel() / (2 * good)


def centring_loss(chosen_B: Tensor, rejected_B: Tensor, *, num_pairs: float, weights_B: Tensor | None = None) -> Tensor:
    """Σ w (s_chosen + s_rejected)² / num_pairs: pins the offset that comparisons leave free, to a mean near 0.

    Eisenstein et al. 2023, "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
    section 2.
    """
    squares_B = (chosen_B + rejected_B).square()
    return (squares_B if weights_B is None else weights_B * squares_B).sum() / num_pairs


def _logistic(logits_B: Tensor, targets_B: Tensor, weights_B: Tensor | None) -> Tensor:
    losses_B = -(targets_B * logsigmoid(logits_B) + (1 - targets_B) * logsigmoid(-logits_B))
    return torch.sum(losses_B if weights_B is None else weights_B * losses_B)
