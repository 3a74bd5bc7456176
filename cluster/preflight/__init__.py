"""Refuses a run that cannot work, before a model loads or a file is written."""

from cluster.preflight.checks import Preflight, check

__all__ = ["Preflight", "check"]
