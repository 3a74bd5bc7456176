"""What ingress, replicas and the version keeper say to each other."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from contracts.records import WeightsUpdate
from models.engine_adapters import AdapterSettings
from serving.wire import ReplyTo

VERSIONS = "versions"  # the deployment of the version keeper
LIVE = "live"  # the slot of the replicas that follow training; `pinned-7` is that of a version with its own replica


@dataclass(frozen=True)
class PolicyRequest:
    """One request to a replica; `body` is an OpenAI request that the ingress has checked.

    `answer_id` names the answer in the API. Without `max_tokens` in the body the replica writes what fits, at most
    `limits.max_response_tokens`. The replica gives up `deadline_s` after it has the request. A replica on the node of
    `reply_to` says all that it has to say there, head included.
    """

    kind: Literal["chat", "completion"]
    body: dict[str, Any]
    answer_id: str
    deadline_s: float
    reply_to: ReplyTo | None = None


@dataclass(frozen=True)
class Head:
    """The first thing that a replica says: bytes follow only where `status` is 200.

    A draining replica that is not the only one of its slot says `draining`: ask another. `error` is an error in the
    OpenAI shape. `version` is the one that writes the answer (with `allow_mixed`: its first token).

    >>> Head.read(Head(200, 7, "replica-1").written())
    Head(status=200, version=7, replica='replica-1', draining=False, error=None)
    """

    status: int
    version: int
    replica: str
    draining: bool = False
    error: dict[str, Any] | None = None

    def written(self) -> bytes:
        """As JSON: who reads it at the end of a wire unpickles nothing."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, text: bytes) -> Head:
        return cls(**json.loads(text))


Step = tuple[WeightsUpdate, list["ray.ObjectRef"]]


@dataclass(frozen=True)
class Order:
    """What a replica should serve next, and how to get there from what it holds.

    `steps` are applied to the shadow in this order: deltas that begin at the version it holds, or a keyframe and the
    deltas after it. Where they begin with a keyframe, the receiver has to `forget` first: it may be of an older
    version than it holds. A replica whose `version` is the wanted one gets no order.

    `deadline_s` is for all of it, draining included; the turn is over then. `alone`: no other replica of the slot
    serves, so requests wait here instead of going elsewhere.
    """

    version: int
    steps: list[Step]
    deadline_s: float
    alone: bool = True


@dataclass(frozen=True)
class StartWeights:
    """What replicas load from disk when they start: the policy folder `path` is version `version`.

    With `adapters` `path` is the model that they are for, it is version `version` under the initial one, and every
    later version is an adapter too.
    """

    path: str
    version: int
    dtype: str = "bfloat16"
    adapters: AdapterSettings | None = None


@dataclass(frozen=True)
class VersionRow:
    """One line of the history: a version and what became of it. `time` is in seconds since the epoch.

    `metrics` are the gate's (reward, kl, length of candidate and current), empty where there is no gate.
    """

    version: int
    time: float
    status: Literal["published", "refused", "promoted", "rolled_back", "pinned", "released"]
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a candidate: `reason` names the limit that it broke, or what it was compared with."""

    promote: bool
    reason: str
    metrics: dict[str, float]
