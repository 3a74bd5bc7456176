"""Rows of a file one at a time, each with its place for errors: Parquet, JSON lines, Hugging Face datasets folders."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import ConfigError
from contracts.records import SCHEMA_VERSION
from feedback.exports import datasets_package


def file_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for errors, row) of each row of a file with these columns.

    Raises:
        ConfigError: the file cannot be read, or a column is missing in all of it.
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _parquet_rows(path, required)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_rows(path)
        elif path.is_dir():
            yield from _folder_rows(path, required)
        else:
            raise ConfigError(f"{path}: read are .parquet, .jsonl, .jsonl.gz and datasets folders")
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        message = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read: {message}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # JSON or UTF-8
                raise ConfigError(f"{path}:{number}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: a row is an object with named columns, not {row!r:.60}")
            yield f"{path}:{number}", row


def _parquet_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with pq.ParquetFile(path) as file:
        version = (file.schema_arrow.metadata or {}).get(b"headrace_schema_version", b"1")
        if version != str(SCHEMA_VERSION).encode():
            raise ConfigError(f"{path}: has schema version {version.decode()}, this Headrace reads {SCHEMA_VERSION}")
        _check_columns(path, file.schema_arrow.names, required)
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        try:
            for number, row in enumerate(rows, start=1):
                yield f"{path}:{number}", row
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: a text is not UTF-8: {error}") from error


def _folder_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    datasets = datasets_package()
    found = datasets.load_from_disk(str(path))
    if not isinstance(found, datasets.Dataset):
        raise ConfigError(f"{path}: has several splits, give the folder of one: {', '.join(found)}")
    _check_columns(path, found.column_names, required)
    for number, row in enumerate(found, start=1):
        yield f"{path}:{number}", row


def _check_columns(path: Path, columns: Sequence[str], required: tuple[str, ...]) -> None:
    for name in required:
        if name not in columns:
            raise ConfigError(f"{path}: column {name!r} is missing, there are: {', '.join(columns)}")
