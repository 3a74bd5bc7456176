"""Files of pairs and of labels, several at once, with what was left out of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from contracts.config import ConfigError
from contracts.records import Comparison
from feedback.formats import read_unpaired, write_preferences, write_unpaired
from feedback.judged_files import read_judged
from feedback.quality import UnpairedLabel

LABEL = UnpairedLabel("Why?", "so", True, "p", 2, 3, "talk")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_files_are_told_apart_by_their_columns_and_keep_their_order(tmp_path: Path) -> None:
    first, second = Comparison("a", "b", "c", prompt_id="1", domain="x"), Comparison("d", "e", "f", probability=0.5)
    write_preferences([first], tmp_path / "first.parquet")
    write_unpaired([LABEL], tmp_path / "labels.parquet")
    jsonl = write(
        tmp_path / "second.jsonl",
        [
            {"prompt": "d", "chosen": "e", "rejected": "f", "probability": 0.5},
            {"prompt": "d", "chosen": "same", "rejected": "same"},
        ],
    )
    more = write(
        tmp_path / "more.jsonl",
        [{"prompt": "p", "completion": "", "label": False}, {"prompt": "p", "completion": "c", "label": 0}],
    )
    judged = read_judged([tmp_path / "first.parquet", tmp_path / "labels.parquet", jsonl, more])
    assert [row.chosen for row in judged.comparisons] == [first.chosen, second.chosen]
    assert judged.comparisons[1].probability == 0.5, "a tie stays"
    assert [(row.response, row.good) for row in judged.labels] == [("so", True), ("c", False)]
    assert judged.dropped == {"identical": 1, "empty": 1}
    assert judged.rows == 6


def test_the_domain_of_a_label_is_written_and_read(tmp_path: Path) -> None:
    write_unpaired([LABEL], tmp_path / "labels.jsonl")
    assert read_unpaired(tmp_path / "labels.jsonl") == ([LABEL], {})


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: holds no rows"):
        read_judged([write(tmp_path / "none.jsonl", [])])
