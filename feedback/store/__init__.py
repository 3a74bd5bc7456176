"""The store of prompts, responses, tasks and judgments (SQLAlchemy: SQLite, or PostgreSQL by URL)."""

from feedback.store.judging import ImportedVote
from feedback.store.records import (
    AggregateRun,
    Assignment,
    Candidate,
    Gap,
    ImportReport,
    Judgment,
    Person,
    Progress,
    Receipt,
    Refused,
    Totals,
    Written,
)
from feedback.store.results import DatasetQuery, DatasetVersion
from feedback.store.store import Store

__all__ = [
    "AggregateRun",
    "Assignment",
    "Candidate",
    "DatasetQuery",
    "DatasetVersion",
    "Gap",
    "ImportReport",
    "ImportedVote",
    "Judgment",
    "Person",
    "Progress",
    "Receipt",
    "Refused",
    "Store",
    "Totals",
    "Written",
]
