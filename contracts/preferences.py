"""Where a run's comparisons come from: files, a panel of simulated voters, or people; and the reward model of them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from contracts.reward_model import RewardModelConfig
from contracts.section import Fraction, FunctionPath, Positive, PositiveInt, Section


class VoterGroup(Section):
    """Simulated voters of one kind."""

    count: PositiveInt
    accuracy: Fraction = Field(description="how often a vote agrees with the gold judge; below 0.5 is hostile")


class SimulatedVotes(Section):
    """A panel of simulated voters, for runs without people. The gold judge stays hidden from the training."""

    gold: FunctionPath
    pairs: PositiveInt = 256
    votes_per_pair: PositiveInt = 5
    voters: dict[str, VoterGroup] = Field(
        default_factory=lambda: {
            "careful": VoterGroup(count=6, accuracy=0.9),
            "careless": VoterGroup(count=2, accuracy=0.6),
            "hostile": VoterGroup(count=2, accuracy=0.15),
        },
        min_length=1,
    )

    @model_validator(mode="after")
    def _enough_voters(self) -> Self:
        voters = sum(group.count for group in self.voters.values())
        if voters < self.votes_per_pair:
            raise ValueError(f"votes_per_pair is {self.votes_per_pair} but the panel has only {voters} voters")
        return self


class PeopleVotes(Section):
    """People who vote at the page of `headrace label` on the same store; all that they said there counts."""

    store: str = Field(min_length=1, description="file or URL of the feedback store")
    pairs: PositiveInt = Field(default=256, description="of the policy's responses, asked about each time")
    votes_per_pair: PositiveInt = 3
    wait_s: Positive = Field(default=86_400.0, description="then the votes that have come are what there is")
    min_comparisons: PositiveInt = Field(default=16, description="with fewer the run ends, and nothing is lost")


class PreferencesConfig(Section):
    """Where comparisons come from, and the reward model trained on them."""

    path: Path | tuple[Path, ...] | None = Field(
        default=None,
        description="files of pairs (prompt, chosen, rejected) or labels (prompt, completion, label), Parquet or JSONL",
    )
    simulate: SimulatedVotes | None = None
    people: PeopleVotes | None = None
    reward_model: RewardModelConfig = RewardModelConfig()

    @property
    def paths(self) -> tuple[Path, ...]:
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, Path) else self.path

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(map(bool, (self.paths, self.simulate, self.people))) != 1:
            raise ValueError("give exactly one of path, simulate and people")
        return self
