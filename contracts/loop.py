"""Settings of the closed loop: ask, learn a reward, train on it, and ask again about what the policy says now."""

from __future__ import annotations

from contracts.section import PositiveInt, Section


class LoopConfig(Section):
    """Rounds of `headrace loop`: each asks about the current policy's responses, trains the reward model on all votes
    so far, and gives PPO its share of `steps`."""

    rounds: PositiveInt = 3

    def begins(self, round_: int, steps: int) -> int:
        """The version at which a round (from 1) begins, of a run of so many steps."""
        return steps * (round_ - 1) // self.rounds
