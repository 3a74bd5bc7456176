"""Files that a reward model learns from: pairs and labels, told apart by their columns, several at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contracts.config import ConfigError
from contracts.records import Comparison
from feedback.formats import file_rows, read_preferences, read_unpaired
from feedback.quality import UnpairedLabel


@dataclass(frozen=True)
class Judged:
    """What some files hold, in their order, and how many rows were left out, by reason."""

    comparisons: list[Comparison]
    labels: list[UnpairedLabel]
    dropped: dict[str, int]

    @property
    def rows(self) -> int:
        """Of the files, those left out included."""
        return len(self.comparisons) + len(self.labels) + sum(self.dropped.values())


def read_judged(paths: Sequence[Path]) -> Judged:
    """Read files of `feedback.formats`; one with `completion` and `label` holds labels, any other pairs.

    Raises:
        ConfigError: as `read_preferences` and `read_unpaired`; also a file without rows.
    """
    comparisons: list[Comparison] = []
    labels: list[UnpairedLabel] = []
    dropped: Counter[str] = Counter()
    for path in paths:
        columns = set(next((row for _, row in file_rows(path, ())), {}))
        if not columns:
            raise ConfigError(f"{path}: holds no rows")
        if {"completion", "label"} <= columns:
            found, left_out = read_unpaired(path)
            labels += found
        else:
            pairs, left_out = read_preferences(path)
            comparisons += pairs
        dropped.update(left_out)
    return Judged(comparisons, labels, dict(dropped))
