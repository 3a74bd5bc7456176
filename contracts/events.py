"""What happens to a run beside its steps: one record for each start, death, expiry, delivery and checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EventKind = Literal[
    "phase",  # the run turns to something else, or comes to its first response
    "start",  # a part of the run is up
    "restart",  # another one is up in the place of one that died
    "start_failed",  # it did not come up
    "death",  # it died, fell silent, or does not serve what it should
    "drain",  # it must leave and gets nothing new; and then, that it has left
    "scale",  # another number of rollout workers is wanted
    "pending",  # no node has room for it
    "killed",  # it did not stop by itself when asked to
    "untracked",  # a tracker failed or fell silent
    "expiry",  # a prompt group outlived its lease
    "quarantine",  # a trajectory that cannot be trained on
    "rollover",  # an engine took new weights
    "refusal",  # an engine did not take a delta, or a component a reward model
    "reward_rollout",  # a reward component scores with another reward model from now on
    "checkpoint",
    "alarm",  # a sign of over-optimisation
    "alarm_cleared",  # it is gone
    "asked",  # people are asked about responses
    "roll_back",  # what came after a checkpoint is set aside
    "disk_full",  # what has to be written waits for room
    "lost",  # an object of the object store
    "resume",
    "signal",
    "end",  # of the run, whichever way
]


@dataclass(frozen=True)
class Event:
    """What happened to whom, why, and what the run does about it. The log adds the time and the step.

    `node` is the address of the machine, where it is known.

    >>> Event("death", "rollout-0", cause="The actor died", consequence="another is started in 1 s").who
    'rollout-0'
    """

    event: EventKind
    who: str
    cause: str = ""
    consequence: str = ""
    node: str = ""


def first_line(error: BaseException) -> str:
    """An error as the cause of an event: the first line that says anything, of a group of errors that of the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
