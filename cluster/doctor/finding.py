"""One line of `headrace doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """`bad`: runs will fail here. `warn`: they may, or will be slower. `advice` says what to do, empty where ok."""

    name: str
    status: Status
    detail: str
    advice: str = ""
