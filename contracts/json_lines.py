"""A file of one JSON object a line, readable at any moment: a line is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from contracts.disk import is_full


class JsonLines:
    """Appends to a file. A last line that a crash has cut off gets its end, so that no other joins it.

    Args:
        synced: whether a line is durable when it is written, also for a machine that crashes.
    """

    def __init__(self, path: Path, *, synced: bool) -> None:
        self.path, self._synced = path, synced
        self._file = FileIO(path, "a+")
        self._kept: list[bytes] = []
        if size := path.stat().st_size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line after those that are kept.

        Raises:
            OSError: it is not written, nor is a part of it.
        """
        self.flush()
        self._write(_line(row))

    def keep(self, row: Mapping[str, Any]) -> None:
        """Write a line now or, where the disk is full, later: with the next one or `flush`."""
        self._kept.append(_line(row))
        try:
            self.flush()
        except OSError as error:
            if not is_full(error):
                raise

    def flush(self) -> None:
        """Write what is kept.

        Raises:
            OSError: some of it is not written.
        """
        while self._kept:
            self._write(self._kept[0])
            del self._kept[0]

    def close(self) -> int:
        """Returns how many lines found no room to the end."""
        try:
            self.flush()
        except OSError as error:
            if not is_full(error):
                raise
        self._file.close()
        return len(self._kept)

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # a disk that fills up takes a part before it refuses the rest
                line = line[self._file.write(line) :]
            if self._synced:
                os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)
            raise


def _line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate in a response is no UTF-8: backslashreplace makes it the JSON escape that it should be.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
