"""What went otherwise than planned, from events.jsonl: a row an event, quarantined trajectories counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cluster.progress import duration
from cluster.report.run_files import Row, value

_COMMON = {"phase", "rollover"}  # of every run, one for each engine and version: counted, not shown


@dataclass(frozen=True)
class Happening:
    """A row of the table. `after` is the time since the first event of the run."""

    after: str
    when: float | str
    event: str
    who: str
    cause: str
    consequence: str
    step: str


def happenings(rows: Sequence[Row]) -> list[Happening]:
    """All but the ordinary ones; what was quarantined one after the other is one row."""
    times = [time for row in rows if math.isfinite(time := value(row, "time"))]
    shown = [row for row in rows if row.get("event") not in _COMMON]
    return [
        _happening(list(same), min(times, default=math.nan))
        for _, same in groupby(enumerate(shown), lambda place: place[0] if not _is_bad(place[1]) else -1)
    ]


def totals(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Events by kind, the most frequent first."""
    return Counter(str(row.get("event", "?")) for row in rows).most_common()


def _is_bad(row: Row) -> bool:
    return row.get("event") == "quarantine"


def _happening(places: Sequence[tuple[int, Row]], began: float) -> Happening:
    row = places[0][1]
    time = value(row, "time")
    who, cause, consequence, step = (_text(row, key) for key in ("who", "cause", "consequence", "step"))
    if len(places) > 1:
        who, (reason, times) = (
            f"{len(places)} trajectories",
            Counter(_text(row, "cause") for _, row in places).most_common(1)[0],
        )
        cause = f"{times} times: {reason}"
    if node := _text(row, "node"):
        who = f"{who} on {node}"
    after = duration(time - began) if math.isfinite(time - began) else ""
    return Happening(after, row.get("time", ""), _text(row, "event").replace("_", " "), who, cause, consequence, step)


def _text(row: Row, key: str) -> str:
    return str(row.get(key, ""))
