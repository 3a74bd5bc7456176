"""TensorBoard's event files in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.trackers.tracker import Row, curves


class TensorBoard:
    """Writes to `folder`; what it shows from `purge_step` on is hidden, for a run that goes on before that."""

    name = "TensorBoard"

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        self._writer = SummaryWriter
        self._folder = folder
        self._purge_step = purge_step
        self._board: Any = None

    def open(self) -> str:
        self._board = self._writer(str(self._folder), purge_step=self._purge_step)
        return ""

    def write(self, row: Row) -> None:
        for name, value in curves(row).items():
            self._board.add_scalar(name, value, row["step"])
        self._board.flush()

    def close(self, *, failed: bool) -> None:
        self._board.close()
