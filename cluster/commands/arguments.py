"""What several commands take: a configuration file, and settings to change in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file, for example examples/quickstart.yaml")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings to change, for example training.learning_rate=2e-6"),
]
