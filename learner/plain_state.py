"""Reading sharded checkpoints without running what they say.

torch.distributed.checkpoint pickles what it knows about its files, and unpickles it, and every value that is not a
tensor, without a limit: who gives you such a folder to resume from could give you code. Here only its own records,
tensors and plain values come back.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

_RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_PATHS = ("pathlib", "pathlib._local")
_FUNCTIONS = {("torch.serialization", "_get_layout"): torch.serialization._get_layout}


class PlainReader(FileSystemReader):
    """Reads a checkpoint's folder; ValueError where its metadata hold anything but records of checkpoints."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.path / ".metadata"  # type: ignore[operator]
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata: Metadata = _RecordUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path}: not the metadata of a checkpoint: {error}") from error
        return metadata


class PlainPlanner(DefaultLoadPlanner):
    """Takes over tensors and plain values; ValueError where a value is anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{read_item.storage_index.fqn}: not a tensor or a plain value: {error}") from error
        value.seek(0)
        super().load_bytes(read_item, value)


class _RecordUnpickler(pickle.Unpickler):
    """Builds nothing but what is named above; what these modules only import is not theirs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        found = super().find_class(module, name) if module in (*_RECORDS, *_PATHS, "torch") else None
        is_record = module in _RECORDS and isinstance(found, type) and found.__module__ == module
        is_path = module in _PATHS and name in ("Path", "PosixPath", "PurePosixPath")
        is_torch = module == "torch" and (name == "Size" or isinstance(found, torch.dtype))
        if not (is_record or is_path or is_torch):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found
