"""When a drift is an alarm: beyond the threshold for some steps in a row, until it is well below it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contracts.watch import AlarmConfig


@dataclass
class Trigger:
    """One alarm. `onset` is the first step of the present run of steps beyond the threshold."""

    config: AlarmConfig
    raised: bool = False
    onset: int | None = None
    beyond: int = 0  # steps in a row

    def update(self, step: int, drift: float, *, noise: float) -> Literal["raised", "cleared"] | None:
        """Take the drift of a step; what changed. A drift below `noise` is none, whatever the threshold."""
        if drift > max(self.config.drift, noise):
            self.onset = step if self.beyond == 0 and not self.raised else self.onset
            self.beyond += 1
            if not self.raised and self.beyond >= self.config.raise_after:
                self.raised = True
                return "raised"
            return None
        self.beyond = 0
        if self.raised and drift < self.config.clear_below * self.config.drift:
            self.raised, self.onset = False, None
            return "cleared"
        if not self.raised:
            self.onset = None
        return None
