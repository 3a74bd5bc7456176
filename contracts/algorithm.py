"""What the learner optimises (`algorithm`) and how it gets there (`training`).

One code path serves all algorithms; their names set defaults, and every part can be set by itself.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from contracts.section import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, Section

Aggregation = Literal["token", "sequence", "constant"]
_AGGREGATION: dict[str, Aggregation] = {"grpo": "sequence", "dr_grpo": "constant"}


class AlgorithmConfig(Section):
    """The objective: PPO (Schulman et al. 2017), decoupled (Hilton et al. 2022), or one of those without a critic.

    `grpo` (Shao et al. 2024), `dr_grpo` (Liu et al. 2025), `rloo` (Ahmadian et al. 2024) and `reinforce++` (Hu 2025)
    compare each response with others instead of with a critic. DAPO (Yu et al. 2025) is `grpo` with `clip_high: 0.28`,
    `loss_aggregation: token`, `kl_coef: 0`, `overlong_buffer_tokens` and `drop_equal_groups: true`.
    """

    name: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce++"] = "ppo"
    critic: Literal["shared", "separate"] = Field(
        default="shared", description="ppo: a value head on the policy's trunk, or a model of its own"
    )
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.2
    loss_aggregation: Aggregation | None = Field(
        default=None,
        description="token: all tokens weigh the same; sequence: all responses do; constant: tokens over "
        "max_response_tokens; default: sequence for grpo, constant for dr_grpo, token for the others",
    )
    behavior_weight_cap: Annotated[float, Field(ge=1)] = Field(
        default=2.0, description="at most this much of proximal / behaviour probability"
    )
    behavior_weight_level: Literal["token", "sequence"] = "token"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    value_clip: Positive = 0.2
    value_coef: NonNegative = 0.1
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    kl_coef: NonNegative = 0.05
    monitor_kl: bool = Field(
        default=True,
        description="false, with kl_coef 0: training never asks the reference, kl_to_reference is reported as 0, and "
        "only the evaluation measures KL",
    )
    kl_in: Literal["reward", "loss"] | None = Field(
        default=None, description="default: loss for grpo and dr_grpo, reward for the others"
    )
    kl_estimator: Literal["k2", "k3"] = Field(
        default="k3", description="in the loss; in the reward it is k1, whose score-function gradient is right"
    )
    kl_target: Positive | None = Field(
        default=None, description="KL per response that kl_coef steers to; default: fixed"
    )
    kl_horizon: PositiveInt = Field(
        default=2000, description="responses over which kl_coef adapts (Ziegler et al. 2019)"
    )
    entropy_coef: NonNegative = 0.0
    normalise_rewards: bool = Field(default=False, description="scores in units of their running standard deviation")
    normalise_values: bool = Field(default=False, description="the critic predicts normalised returns (PopArt)")
    overlong_buffer_tokens: PositiveInt | None = Field(
        default=None, description="DAPO: responses that end within this many tokens of the limit are penalised"
    )
    overlong_penalty: Positive = Field(default=1.0, description="reward taken from a response at the limit")
    drop_equal_groups: bool = Field(
        default=False, description="DAPO: groups whose rewards are all equal are dropped and others sampled instead"
    )

    @property
    def has_critic(self) -> bool:
        return self.name == "ppo"

    @property
    def aggregation(self) -> Aggregation:
        return self.loss_aggregation or _AGGREGATION.get(self.name, "token")

    @property
    def kl_in_loss(self) -> bool:
        return (self.kl_in or ("loss" if self.name in ("grpo", "dr_grpo") else "reward")) == "loss"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.has_critic:
            for field in ("truncation", "normalise_values"):
                if getattr(self, field) not in ("terminal", False):
                    raise ValueError(f"{field} needs a critic, and {self.name} has none")
        if not self.monitor_kl and self.kl_coef > 0:
            raise ValueError(f"monitor_kl is false, but kl_coef {self.kl_coef:g} needs the reference: set kl_coef to 0")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target adapts kl_coef by factors, so kl_coef must start above 0")
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, through PEFT): they alone are trained, published and kept."""

    rank: Annotated[int, Field(gt=0, le=512)] = Field(default=16, description="vLLM loads adapters of at most 512")
    alpha: PositiveInt = Field(default=32, description="adapters are scaled by alpha / rank")
    target_modules: tuple[str, ...] | None = Field(
        default=None, description="names of linear layers; default: all but the output projection"
    )


class TrainingConfig(Section):
    """Batches, memory and the optimizer."""

    batch_size: PositiveInt = Field(default=64, description="responses a step")
    samples_per_prompt: PositiveInt = 1
    epochs: PositiveInt = 2
    minibatches: PositiveInt = Field(default=2, description="optimizer steps an epoch")
    micro_batch_tokens: PositiveInt = Field(default=4096, description="tokens that one forward pass may hold")
    packing: Literal["shared_prompts", "sequences", "padded"] = Field(
        default="shared_prompts",
        description="sequences end to end, a group's prompt once; end to end; or padded side by side",
    )
    learning_rate: Positive = 1e-6
    value_learning_rate: Positive = Field(default=1e-4, description="of the value head (a separate critic: all of it)")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="how the learning rate falls towards 0 at the last step, after the warm-up"
    )
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    max_skipped_steps: PositiveInt = Field(
        default=3, description="steps in a row without any finite gradient after which the run stops"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute each layer in the backward pass: less memory, a third more work"
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="compute; masters are fp32")
    lora: LoraConfig | None = None

    @property
    def prompts_per_batch(self) -> int:
        return self.batch_size // self.samples_per_prompt

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by samples_per_prompt {self.samples_per_prompt}"
            )
        if self.prompts_per_batch % self.minibatches:
            raise ValueError(
                f"batch_size / samples_per_prompt, {self.prompts_per_batch}, is not divisible by minibatches "
                f"{self.minibatches}: minibatches are made of whole groups"
            )
        return self
