"""Whose turn it is to take new weights: while a replica drains, the others of its slot answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

_SILENT_S = 30.0  # after its last poll, or sign of life, a replica is taken for gone
_PAUSES_S = (0.0, 5.0, 20.0, 60.0)  # after so many refusals in a row

State = Literal["starting", "serving", "changing", "late"]


@dataclass
class _Replica:
    """`since` says when the state began, `until` when it has to be heard of again, `ends` when its turn is over."""

    version: int | None
    running: int
    state: State
    since: float
    until: float
    ends: float = 0.0
    refusals: int = 0
    not_before: float = 0.0
    error: str = ""


class Turns:
    """The replicas of all slots. Times are on any clock that does not go back, in seconds."""

    def __init__(self) -> None:
        self._slots: dict[str, dict[str, _Replica]] = {}
        self._left: set[str] = set()  # a question of one of them may still be waiting, or on its way

    def polled(
        self, slot: str, replica: str, version: int | None, running: int, now: float, wait_s: float, *, starting: bool
    ) -> None:
        """It serves `version`, or nobody yet, and waits to be told; nothing, where it has left."""
        if replica in self._left:
            return
        state: State = "starting" if starting else "serving"
        known = self._slots.setdefault(slot, {}).setdefault(replica, _Replica(version, running, state, now, now))
        if known.state != state:
            known.state, known.since = state, now
        known.version, known.running, known.until = version, running, now + wait_s + _SILENT_S

    def may_change(self, slot: str, replica: str, now: float) -> bool:
        """At most half of those that serve change at once, and at least one may. One that starts may always, and one
        that has left never.
        """
        self._forget_silent(now)
        me = self._slots.get(slot, {}).get(replica)
        if me is None or now < me.not_before:
            return False
        return me.state == "starting" or self._num(slot, "changing") < max(
            1, self._num(slot, "serving", "changing") // 2
        )

    def changes(self, slot: str, replica: str, now: float, deadline_s: float) -> None:
        """It is its turn, for `deadline_s`."""
        me = self._slots[slot][replica]
        if me.state != "starting":
            me.state, me.since = "changing", now
        me.until = me.ends = now + deadline_s

    def at_work(self, slot: str, replica: str, now: float) -> None:
        """A sign of life of one whose turn it is: without another it has lost the turn long before `deadline_s`."""
        me = self._slots.get(slot, {}).get(replica)
        if me is not None and me.state in ("changing", "starting"):
            me.until = min(me.ends, now + _SILENT_S)

    def alone(self, slot: str, replica: str) -> bool:
        """Whether no other replica of the slot serves."""
        others = (each for name, each in self._slots[slot].items() if name != replica)
        return not any(each.state == "serving" for each in others)

    def changed(self, slot: str, replica: str, version: int | None, error: str, now: float) -> None:
        """The turn is over."""
        if replica in self._left:
            return
        me = self._slots.setdefault(slot, {}).setdefault(replica, _Replica(version, 0, "serving", now, now))
        if me.state != "starting":
            me.state = "serving"
        me.version, me.since, me.until, me.error = version, now, now + _SILENT_S, error
        me.refusals = me.refusals + 1 if error else 0
        me.not_before = now + _PAUSES_S[min(max(0, me.refusals - 1), len(_PAUSES_S) - 1)]

    def refused(self, slot: str, replica: str) -> bool:
        """Whether it did not take what it was sent last."""
        return self._slots[slot][replica].refusals > 0

    def leaves(self, slot: str, replica: str) -> bool:
        """Nobody waits for it any more, and it does not come back; whether it was there."""
        self._left.add(replica)
        return self._slots.get(slot, {}).pop(replica, None) is not None

    def next_change_s(self, now: float) -> float:
        """After how long a turn ends, or a pause, by itself."""
        every = [each for slot in self._slots.values() for each in slot.values()]
        ends = [each.until for each in every if each.state == "changing"] + [each.not_before for each in every]
        return min((end - now for end in ends if end > now), default=_SILENT_S)

    def status(self, now: float) -> list[dict[str, Any]]:
        """A replica each: what it serves, and for how many seconds it has been in its state."""
        self._forget_silent(now)
        return [
            {
                "slot": slot,
                "replica": name,
                "version": each.version,
                "running": each.running,
                "state": each.state,
                "state_s": round(now - each.since, 3),
                "error": each.error,
            }
            for slot, replicas in sorted(self._slots.items())
            for name, each in sorted(replicas.items())
        ]

    def _forget_silent(self, now: float) -> None:
        """One that did not finish in time has lost its turn, and one that does not poll any more is gone."""
        for replicas in self._slots.values():
            for name, each in list(replicas.items()):
                if now < each.until:
                    continue
                if each.state == "changing":
                    each.state, each.since, each.until = "late", each.until, each.until + _SILENT_S
                else:
                    del replicas[name]

    def _num(self, slot: str, *states: State) -> int:
        return sum(each.state in states for each in self._slots[slot].values())
