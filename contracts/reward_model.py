"""Training of a reward model on comparisons and labels: its own settings, and a run that does nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from contracts.algorithm import LoraConfig
from contracts.section import NonNegative, NonNegativeInt, Positive, PositiveInt, Section

HeadName = Annotated[str, Field(pattern=r"^[\w-]+$")]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5)]


class RewardModelConfig(Section):
    """A Bradley-Terry reward model: which network learns it, from which loss, and what is kept aside to judge it."""

    base: str | None = Field(default=None, description="default: the policy model")
    learning_rate: Positive = 2e-5
    head_learning_rate: Positive = 1e-3
    epochs: PositiveInt = 1
    batch_size: PositiveInt = Field(default=16, description="comparisons and labels an optimizer step")
    trainable_layers: NonNegativeInt | None = Field(
        default=None, description="train only the last N layers; default: all"
    )
    lora: LoraConfig | None = Field(default=None, description="train adapters of all layers, and the heads")
    heads: dict[HeadName, tuple[str, ...]] = Field(
        default={"reward": ()},
        min_length=1,
        description="named heads on one trunk, each with the domains that it learns from; none: from all rows",
    )
    members: PositiveInt = Field(default=1, description="heads of an ensemble; their mean is the score")
    bootstrap: bool = Field(default=True, description="each member of an ensemble learns from prompts drawn anew")
    margin: NonNegative = Field(
        default=0.0, description="by how much a score must win where all voters agree; less where fewer do"
    )
    label_smoothing: BelowHalf = Field(default=0.0, description="p becomes p (1 - 2 e) + e: never quite sure")
    flip_rate: BelowHalf = Field(
        default=0.0, description="share of wrong labels; the loss is then an unbiased estimate of that on right ones"
    )
    centring: NonNegative = Field(default=0.0, description="weight of (sum of both scores)^2; 0.01 is usual")
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: good and bad labels weigh the same in sum"
    )
    calibration_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="of the prompts not held out, for the temperature alone; 0: it stays 1"
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    max_tokens: PositiveInt = 1024
    num_ranks: PositiveInt = Field(
        default=1, description="processes of one machine that share each batch, each with the whole model"
    )
    checkpoint_steps: PositiveInt = Field(default=50, description="headrace reward-train: steps between checkpoints")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.lora is not None and self.trainable_layers is not None:
            raise ValueError("give lora or trainable_layers, not both: adapters leave every layer frozen")
        if self.num_ranks > self.batch_size:
            raise ValueError(f"num_ranks {self.num_ranks} is more than batch_size {self.batch_size}: some would idle")
        if self.label_smoothing and self.flip_rate:
            raise ValueError("give label_smoothing or flip_rate, not both: at equal values one undoes the other")
        return self


class RewardPreferences(Section):
    """Judged rows in files, and the reward model to train on them."""

    path: Path | tuple[Path, ...] = Field(
        description="files of pairs (prompt, chosen, rejected) or labels (prompt, completion, label), Parquet or JSONL"
    )
    reward_model: RewardModelConfig = RewardModelConfig()

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,) if isinstance(self.path, Path) else self.path

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.paths:
            raise ValueError("path: name at least one file")
        if self.reward_model.base is None:
            raise ValueError("reward_model.base: required, there is no policy model here to start from")
        return self


class RewardTrainConfig(Section):
    """What `headrace reward-train` does: files in, `output_dir`/reward_model out."""

    output_dir: Path
    preferences: RewardPreferences
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    resume: bool = False
    threads: PositiveInt | None = Field(default=None, description="compute threads; default: all cores")
    device: Literal["cpu", "cuda"] = "cpu"
