"""Seconds from the command to the first rollout and the first update, and where they go, from a run's files."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    raise NotImplementedError
