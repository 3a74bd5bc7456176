"""Rows into files that appear complete or not at all: Parquet, JSON lines, or a Hugging Face datasets folder."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import ConfigError

_ROWS_AT_ONCE = 2_000
Writer = Callable[[Iterable[pa.Table], pa.Schema, Path, str], None]


def write_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema, path: Path) -> None:
    """Write by what the name ends with: .parquet, .jsonl, .jsonl.gz, or without an ending a datasets folder.

    Rows are taken a few thousand at a time. Folders on the way are made.

    Raises:
        ConfigError: what `check_place` raises.
    """
    write = check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(_tables(rows, schema), schema, unfinished, path.name.lower())
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def check_place(path: Path) -> Writer:
    """What writes a file of that name.

    Raises:
        ConfigError: another ending; a datasets folder without the package `datasets`, or where something is already.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _write_parquet
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _write_json
    if "." in name:
        raise ConfigError(f"{path}: written are .parquet, .jsonl, .jsonl.gz, or a datasets folder without an ending")
    datasets_package()
    if path.exists():
        raise ConfigError(f"{path}: is there already; a datasets folder is written to a new place")
    return _write_folder


def datasets_package() -> Any:
    """The package, imported only where it is needed: it takes seconds.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("Hugging Face datasets folders need the package datasets: pip install datasets")
    import datasets

    return datasets


def _tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    rows = iter(rows)
    while part := list(islice(rows, _ROWS_AT_ONCE)):
        yield pa.Table.from_pylist(part, schema=schema)


def _write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, path: Path, _: str) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _write_json(tables: Iterable[pa.Table], _: pa.Schema, path: Path, name: str) -> None:
    with gzip.open(path, "wb") if name.endswith(".gz") else path.open("wb") as file:
        for table in tables:
            for row in table.to_pylist():
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_folder(tables: Iterable[pa.Table], schema: pa.Schema, path: Path, _: str) -> None:
    datasets = datasets_package()
    path.mkdir()
    rows = path / "rows.arrow"  # read back mapped into memory, not loaded
    with pa.ipc.new_stream(str(rows), schema.remove_metadata()) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(None))
    whole = path / "whole"
    datasets.Dataset.from_file(str(rows)).save_to_disk(str(whole))
    rows.unlink()
    for part in whole.iterdir():
        part.rename(path / part.name)
    whole.rmdir()
