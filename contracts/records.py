"""The records that cross process boundaries, and their Arrow schemas.

A record holds plain Python values, so that every room can read it and nothing is unpickled into a tensor library.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 1

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered with the policy's chat template. `columns` holds what reward functions asked for."""

    prompt_id: str
    tokens: list[int]
    text: str
    messages: list[dict[str, str]]
    domain: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Every list but `prompt_tokens` has one entry per response token.

    `behavior_logprobs` are natural logs under the weights of `weights_versions`, after temperature.
    """

    trajectory_id: str
    prompt_id: str
    group_id: str
    prompt_tokens: list[int]
    response_tokens: list[int]
    response_text: str
    behavior_logprobs: list[float]
    weights_versions: list[int]
    finish_reason: FinishReason
    actor_id: str

    def __post_init__(self) -> None:
        tokens = len(self.response_tokens)
        for name in ("behavior_logprobs", "weights_versions"):
            if len(getattr(self, name)) != tokens:
                raise ValueError(
                    f"trajectory {self.trajectory_id} from {self.actor_id}: {len(getattr(self, name))} {name} "
                    f"for {tokens} response tokens"
                )

    @property
    def oldest_version(self) -> int:
        return min(self.weights_versions)


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its reward (the weighted sum of the components) and reference log-probabilities.

    `reference_logprobs` is empty where the run does not ask for them (`algorithm.monitor_kl: false`).
    """

    rollout: Rollout
    reward: float
    reward_components: dict[str, float]
    reward_version: str
    reference_logprobs: list[float]

    def __post_init__(self) -> None:
        if len(self.reference_logprobs) not in (0, len(self.rollout.response_tokens)):
            raise ValueError(
                f"trajectory {self.rollout.trajectory_id}: {len(self.reference_logprobs)} reference_logprobs "
                f"for {len(self.rollout.response_tokens)} response tokens"
            )

    @property
    def num_bytes(self) -> int:
        """What the record costs in the queue: 8 bytes a number, five numbers a response token."""
        return 8 * (len(self.rollout.prompt_tokens) + 5 * len(self.rollout.response_tokens)) + 256


@dataclass(frozen=True)
class WeightsUpdate:
    """Weights of one version, to be applied to `base_version` (None: a keyframe, complete in itself).

    They travel as `num_frames` frames of `num_bytes` together. `digest` is that of all tensors after the update,
    `fingerprint` that of their names, dtypes and shapes. With `is_adapter` it is a LoRA adapter, a keyframe too, for
    the model that the run started from. `dense_bytes` is what all weights of the policy would take.
    """

    version: int
    base_version: int | None
    num_bytes: int
    digest: str
    dense_bytes: int
    is_adapter: bool = False
    num_frames: int = 1
    fingerprint: str = ""

    @property
    def is_keyframe(self) -> bool:
        return self.base_version is None


@dataclass(frozen=True)
class Comparison:
    """One judged pair in the field's preference format: `chosen` beat `rejected` with `probability`."""

    prompt: str
    chosen: str
    rejected: str
    prompt_id: str = ""
    domain: str = ""
    probability: float = 1.0
    votes_chosen: int = 0
    votes_rejected: int = 0


EXPERIENCE_SCHEMA = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("prompt_id", pa.string()),
        ("group_id", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("response_tokens", pa.list_(pa.int32())),
        ("response_text", pa.string()),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("weights_versions", pa.list_(pa.int32())),
        ("reference_logprobs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("reward_components", pa.map_(pa.string(), pa.float64())),
        ("reward_version", pa.string()),
        ("finish_reason", pa.string()),
        ("actor_id", pa.string()),
    ],
    metadata={"headrace_schema_version": str(SCHEMA_VERSION)},
)

COMPARISON_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("probability", pa.float64()),
        ("votes_chosen", pa.int32()),
        ("votes_rejected", pa.int32()),
    ],
    metadata={"headrace_schema_version": str(SCHEMA_VERSION)},
)

_ROLLOUT_FIELDS = tuple(Rollout.__dataclass_fields__)


def experience_table(scored: Sequence[ScoredRollout]) -> pa.Table:
    """One row a trajectory, in the order given. Log-probabilities become float32, as the learner's tensors are."""
    # By column, and the token lists as they are: copying them took the driver more time than all its decisions.
    columns = {name: [getattr(record.rollout, name) for record in scored] for name in _ROLLOUT_FIELDS}
    for name in ("reward", "reward_version", "reference_logprobs"):
        columns[name] = [getattr(record, name) for record in scored]
    columns["reward_components"] = [list(record.reward_components.items()) for record in scored]
    return pa.Table.from_pydict(columns, schema=EXPERIENCE_SCHEMA)


def experience_records(table: pa.Table) -> list[ScoredRollout]:
    """The records of `experience_table`, token lists as Python lists. float32 log-probabilities come back as such."""
    records = []
    for row in table.to_pylist():
        rollout = Rollout(**{name: row.pop(name) for name in _ROLLOUT_FIELDS})
        row["reward_components"] = dict(row["reward_components"])
        records.append(ScoredRollout(rollout=rollout, **row))
    return records


def comparison_table(comparisons: Iterable[Comparison]) -> pa.Table:
    """Parquet-ready table that TRL's and other reward trainers read (`prompt`, `chosen`, `rejected`)."""
    return pa.Table.from_pylist([asdict(comparison) for comparison in comparisons], schema=COMPARISON_SCHEMA)
