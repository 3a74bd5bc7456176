"""A reward function in a module that does not load while there is a file `crash` in Ray's folder."""

import os
from pathlib import Path

from tests.actors.judges import behave

__all__ = ["behave"]

if Path(os.environ["RAY_TMPDIR"], "crash").exists():
    raise RuntimeError("the judge has lost its mind")
