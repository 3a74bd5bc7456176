"""What a run left in its folder, parsed; what is absent or broken is said, never raised."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError

from cluster.intervals import Interval

Row = Mapping[str, Any]


def value(row: Row, key: str) -> float:
    """NaN where the key is absent or no finite number."""
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return math.nan
    return float(found)


def _interval(value: Any) -> Any:
    return (
        Interval.from_record(value)
        if isinstance(value, Mapping) and {"mean", "low", "high", "n"} <= set(value)
        else value
    )


Bounds = Annotated[Interval, BeforeValidator(_interval)]


class Metric(BaseModel):
    name: str
    role: Literal["proxy", "held_out", "gold", "kl", "length", "other"]
    before: Bounds
    after: Bounds
    difference: Bounds


class Sample(BaseModel):
    prompt_id: str
    prompt: str
    before: str
    after: str
    scores_before: dict[str, FiniteFloat] = {}
    scores_after: dict[str, FiniteFloat] = {}


class Evaluation(BaseModel):
    """evaluation.json: held-out prompts before and after training."""

    schema_version: Literal[1]
    num_prompts: int
    weights_version_before: int
    weights_version_after: int
    metrics: list[Metric]
    samples: list[Sample] = []

    def of(self, role: str) -> list[Metric]:
        return [metric for metric in self.metrics if metric.role == role]


class RewardModel(BaseModel):
    held_out_accuracy: Bounds
    train_pairs: int
    held_out_pairs: int
    seconds: float
    reward_version: int | str


class Preferences(BaseModel):
    """preferences.json: where comparisons came from and how good the reward model trained on them is."""

    simulated: bool
    pairs: int
    votes: int
    dropped: dict[str, int] = {}
    voters: dict[str, FiniteFloat] = {}
    agreement_with_gold: FiniteFloat | None = None
    reward_model: RewardModel | None = None


class WinRate(BaseModel):
    against_round: int
    judged_by: str
    mean: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    n: int


class Round(BaseModel):
    """A round of the closed loop. What it gained is known once it has ended."""

    round: int
    began_at_step: int
    ended_at_step: int | None = None
    pairs: int
    votes: int
    agreement_with_gold: FiniteFloat | None = None
    reward_model: RewardModel
    evaluation: dict[str, Bounds] = {}
    roles: dict[str, str] = {}
    win_rate: WinRate | None = None

    def of(self, role: str) -> list[tuple[str, Interval]]:
        return [(name, self.evaluation[name]) for name, is_ in self.roles.items() if is_ == role]


class Rounds(BaseModel):
    """rounds.json: what each round of the closed loop asked, learnt and gained."""

    schema_version: Literal[1]
    rounds: list[Round]


T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class RunFolder:
    """Reads the files of a run; `missing` collects a sentence for everything that is absent or broken."""

    path: Path
    missing: list[str]

    def text(self, name: str, consequence: str = "") -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            if consequence:
                self.missing.append(f"{name} is missing: {consequence}")
            return None

    def json(self, name: str, consequence: str) -> Any:
        text = self.text(name, consequence)
        if text is None:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            self.missing.append(f"{name} is not valid JSON ({error}): {consequence}")
            return None

    def record(self, name: str, kind: type[T], consequence: str) -> T | None:
        data = self.json(name, consequence)
        if data is None:
            return None
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"])) or "its content"
            self.missing.append(f"{name} cannot be read ({field}: {problem['msg']}): {consequence}")
            return None

    def rows(self, name: str, consequence: str = "") -> list[dict[str, Any]]:
        """Objects of a JSONL file. A line that a kill has torn is left out and said."""
        rows, torn = [], 0
        for line in (self.text(name, consequence) or "").split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                torn += 1
        if torn:
            self.missing.append(f"{name}: {torn} unreadable line{'s' if torn > 1 else ''} left out")
        return rows
