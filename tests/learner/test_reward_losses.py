"""Losses of the reward model against their definitions, by hand and by simulation."""

import math

import pytest
import torch

from learner.reward_model import fit_temperature
from learner.reward_model.calibration import HIGHEST, LOWEST
from learner.reward_model.losses import (
    balanced_class_weights,
    bradley_terry_loss,
    centring_loss,
    label_loss,
    target,
)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_a_tie_wants_equal_scores() -> None:
    margins_B = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    bradley_terry_loss(margins_B, torch.full((3,), 0.5), num_pairs=1, margin=3.0).backward()
    assert margins_B.grad is not None
    assert margins_B.grad[1] == 0, "a margin asks nothing of a tie"
    assert margins_B.grad[0] < 0 < margins_B.grad[2]


def test_margin_by_hand() -> None:
    # p = 1 has to win by the whole margin, p = 0.75 by half of it.
    loss = bradley_terry_loss(torch.tensor([1.5, 0.5]), torch.tensor([1.0, 0.75]), num_pairs=2, margin=1.0)
    first = -log_sigmoid(0.5)
    second = -(0.75 * log_sigmoid(0.0) + 0.25 * log_sigmoid(0.0))
    assert loss.item() == pytest.approx((first + second) / 2)


def test_a_margin_does_not_care_which_side_is_called_chosen() -> None:
    one = bradley_terry_loss(torch.tensor([0.7]), torch.tensor([0.9]), num_pairs=1, margin=0.4)
    other = bradley_terry_loss(torch.tensor([-0.7]), torch.tensor([0.1]), num_pairs=1, margin=0.4)
    assert one.item() == pytest.approx(other.item())


def test_smoothing_has_its_minimum_at_the_smoothed_probability() -> None:
    # p = 1 and e = 0.1 make 0.9: the best difference of scores is log 9, not infinite.
    margin_B = torch.tensor([math.log(9)], requires_grad=True)
    bradley_terry_loss(margin_B, torch.tensor([1.0]), num_pairs=1, label_smoothing=0.1).backward()
    assert margin_B.grad is not None
    assert margin_B.grad.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("flip_rate", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("probability", [1.0, 0.8, 0.5, 0.1])
def test_the_robust_loss_is_unbiased(flip_rate: float, probability: float) -> None:
    """The sum over both things that a flip may do, weighted by how likely each is: the loss on the clean label."""
    margins_B = torch.tensor([-3.0, -0.4, 0.0, 1.3, 5.0], dtype=torch.float64)
    clean = bradley_terry_loss(margins_B, torch.full((5,), probability, dtype=torch.float64), num_pairs=5)
    seen = [
        share
        * bradley_terry_loss(margins_B, torch.full((5,), p, dtype=torch.float64), num_pairs=5, flip_rate=flip_rate)
        for share, p in ((1 - flip_rate, probability), (flip_rate, 1 - probability))
    ]
    assert sum(seen).item() == pytest.approx(clean.item(), rel=1e-9)  # type: ignore[union-attr]
    plain = sum(
        share * bradley_terry_loss(margins_B, torch.full((5,), p, dtype=torch.float64), num_pairs=5)
        for share, p in ((1 - flip_rate, probability), (flip_rate, 1 - probability))
    )
    assert (plain.item() == pytest.approx(clean.item(), rel=1e-3)) == (probability == 0.5)  # type: ignore[union-attr]


def test_the_robust_loss_is_the_published_difference() -> None:
    """Chowdhury et al. 2024, eq. 12: ((1 - e) l(d) - e l(-d)) / (1 - 2 e), l = -log sigmoid."""
    d, e = 0.7, 0.2
    expected = ((1 - e) * -log_sigmoid(d) - e * -log_sigmoid(-d)) / (1 - 2 * e)
    loss = bradley_terry_loss(torch.tensor([d]), torch.tensor([1.0]), num_pairs=1, flip_rate=e)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_smoothing_and_robustness_undo_each_other() -> None:
    p = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    assert target(target(p, label_smoothing=0.2), flip_rate=0.2).tolist() == pytest.approx(p.tolist())
    with pytest.raises(ValueError, match=r"flip_rate is 0\.5"):
        target(p, flip_rate=0.5)


def test_labels_by_hand() -> None:
    # One good response with odds 3 to 1, one bad with even odds that weighs twice.
    loss = label_loss(
        torch.tensor([math.log(3), 0.0]), torch.tensor([1.0, 0.0]), num_labels=4, class_weights=(2.0, 1.0)
    )
    assert loss.item() == pytest.approx((-math.log(0.75) - 2 * math.log(0.5)) / 4)


def test_balanced_classes_weigh_the_same() -> None:
    labels = torch.tensor([1.0] * 9 + [0.0] * 3)
    bad, good = balanced_class_weights(labels)
    assert 9 * good == pytest.approx(3 * bad)
    assert 9 * good + 3 * bad == pytest.approx(12)
    # With a constant score the optimum is then even odds, whatever the share of good ones.
    score = torch.zeros(1, requires_grad=True)
    label_loss(score.expand(12), labels, num_labels=12, class_weights=(bad, good)).backward()
    assert score.grad is not None
    assert score.grad.item() == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="4 good and 0 bad labels"):
        balanced_class_weights(torch.ones(4))


def test_centring_pulls_the_sum_not_the_difference() -> None:
    chosen_B, rejected_B = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    centring_loss(chosen_B, rejected_B, num_pairs=2).backward()
    assert chosen_B.grad is not None
    assert rejected_B.grad is not None
    assert chosen_B.grad.item() == rejected_B.grad.item() == pytest.approx(2 * 4.0 / 2)


def test_weights_are_how_often_a_pair_counts() -> None:
    margins_B, probabilities_B = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.8, 0.6])
    again = [0, 0, 2]
    expected = bradley_terry_loss(margins_B[again], probabilities_B[again], num_pairs=3)
    weighted = bradley_terry_loss(margins_B, probabilities_B, num_pairs=3, weights_B=torch.tensor([2.0, 0.0, 1.0]))
    assert weighted.item() == pytest.approx(expected.item())


def test_temperature_is_the_one_that_made_the_votes() -> None:
    """Exact probabilities at T = 2.5, so the minimum is there; a slow grid finds it too."""
    logits = [0.1 * k for k in range(-40, 41)]
    votes = [1 / (1 + math.exp(-logit / 2.5)) for logit in logits]
    found = fit_temperature(logits, votes)
    assert found == pytest.approx(2.5, rel=1e-6)

    def loss(temperature: float) -> float:
        return sum(
            -(p * log_sigmoid(d / temperature) + (1 - p) * log_sigmoid(-d / temperature))
            for d, p in zip(logits, votes, strict=True)
        )

    assert min((0.5 + 0.05 * k for k in range(100)), key=loss) == pytest.approx(found, abs=0.05)


def test_temperature_has_bounds_where_the_rows_say_nothing() -> None:
    assert fit_temperature([1.0, 2.0], [1.0, 1.0]) == pytest.approx(LOWEST)
    assert fit_temperature([1.0, 2.0], [0.0, 0.0]) == pytest.approx(HIGHEST)
    with pytest.raises(ValueError, match="0 logits"):
        fit_temperature([], [])
    with pytest.raises(ValueError, match="1 not finite"):
        fit_temperature([1.0, math.nan], [1.0, 1.0])
