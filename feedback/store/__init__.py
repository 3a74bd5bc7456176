"""The store of prompts, responses, tasks and judgments (SQLAlchemy: SQLite, or PostgreSQL by URL)."""

from feedback.store.judging import ImportedVote
from feedback.store.records import (
    AggregateRun,
    Assignment,
    Gap,
    ImportReport,
    Judgment,
    Progress,
    Receipt,
    Refused,
)
from feedback.store.results import DatasetQuery, DatasetVersion
from feedback.store.store import Store

__all__ = [
    "AggregateRun",
    "Assignment",
    "DatasetQuery",
    "DatasetVersion",
    "Gap",
    "ImportReport",
    "ImportedVote",
    "Judgment",
    "Progress",
    "Receipt",
    "Refused",
    "Store",
]
