"""Train a Bradley-Terry reward model on comparisons and labels, judge it on prompts it has not seen, and save it."""

from learner.reward_model.calibration import fit_temperature
from learner.reward_model.fitting import Interrupted
from learner.reward_model.losses import bradley_terry_loss, centring_loss, label_loss
from learner.reward_model.measures import accuracy, cross_entropy, held_out, logits, wilson_interval
from learner.reward_model.training import RewardModelReport, train_reward_model

__all__ = [
    "Interrupted",
    "RewardModelReport",
    "accuracy",
    "bradley_terry_loss",
    "centring_loss",
    "cross_entropy",
    "fit_temperature",
    "held_out",
    "label_loss",
    "logits",
    "train_reward_model",
    "wilson_interval",
]
