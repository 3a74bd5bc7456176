"""`headrace reward-eval`: how far a reward model can be believed, on one page and in one JSON file.

`numbers` computes from margins and labels alone, `linear` fits what the model has to beat, `features` are those of a
frozen base, `invariance` asks the model again in other company, `command` runs them all, `page` shows them.
"""

from cluster.reward_eval.command import RewardEvalOptions, evaluate_reward_model

__all__ = ["RewardEvalOptions", "evaluate_reward_model"]
