"""What is watched while a policy climbs its reward, when that is an alarm, and what an alarm leads to (`watch`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from contracts.section import NonNegativeInt, Positive, PositiveInt, Section

AlarmName = Literal["disagreement", "latent", "held_out", "repetition", "sameness", "length", "outliers"]
Share = Annotated[float, Field(gt=0, lt=1)]


class AlarmConfig(Section):
    """When the mean of a batch has left the reference window, and when it has come back.

    The unit is the standard deviation of single responses in the reference window. What three standard errors of the
    two means explain is never an alarm.
    """

    drift: Positive = Field(default=1.0, description="beyond it, in standard deviations of the reference window")
    raise_after: PositiveInt = Field(default=2, description="for so many steps in a row: the alarm is raised")
    clear_below: Share = Field(default=0.5, description="share of `drift` below which it is cleared")


class WatchConfig(Section):
    """Alarms on over-optimisation (Gao et al. 2023, "Scaling laws for reward model overoptimization").

    Each compares a batch with the first `reference_steps` of the run; null switches one off. docs/over-optimisation.md
    says what each of them sees.
    """

    reference_steps: PositiveInt = Field(default=5, description="the first steps, which later ones are compared with")
    disagreement: AlarmConfig | None = Field(default=AlarmConfig(), description="members of reward ensembles differ")
    latent: AlarmConfig | None = Field(
        default=AlarmConfig(), description="features far from those that the reward models were trained on"
    )
    held_out: AlarmConfig | None = Field(
        default=AlarmConfig(), description="the reward runs ahead of the held-out ones: `rewards` of weight 0"
    )
    repetition: AlarmConfig | None = Field(default=AlarmConfig(), description="three tokens again within a response")
    sameness: AlarmConfig | None = Field(default=AlarmConfig(), description="three tokens again in other prompts'")
    length: AlarmConfig | None = Field(default=AlarmConfig(), description="response tokens, either way")
    outliers: AlarmConfig | None = Field(
        default=AlarmConfig(drift=2.0), description="distance of a response's scores from those of the reference"
    )
    on_alarm: Literal["warn", "stop", "roll_back"] = Field(
        default="warn",
        description="stop ends the run; roll_back also sets aside what came after the last good checkpoint",
    )
    feedback_store: str | None = Field(
        default=None, min_length=1, description="file or URL of a feedback store: suspicious responses become tasks"
    )
    suspicious: NonNegativeInt = Field(default=8, description="responses queued for people at an alarm")
    votes_per_task: PositiveInt = Field(default=3, description="votes asked for each of them")

    @property
    def alarms(self) -> dict[AlarmName, AlarmConfig]:
        """Those that are switched on."""
        names: tuple[AlarmName, ...] = AlarmName.__args__  # type: ignore[attr-defined]
        return {name: config for name in names if (config := getattr(self, name)) is not None}
