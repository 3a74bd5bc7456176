"""The labelling page and its API, on Ray Serve, in front of the feedback store."""

from serving.labelling.api import build, labelling_app

__all__ = ["build", "labelling_app"]
