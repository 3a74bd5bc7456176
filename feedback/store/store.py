"""The store itself: each method is one transaction, and what it returned is on disk."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection

from feedback.ballots import Ballots
from feedback.formats import Layout, write_preferences, write_unpaired
from feedback.simulate import Pair, Vote
from feedback.store import asking, importing, judging, people, results
from feedback.store.database import Database
from feedback.store.importing import Truncate, chunks
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
    Source,
    TaskKind,
    Totals,
    check_text,
)
from feedback.store.results import DatasetQuery, DatasetVersion, Judged, Method
from feedback.store.schema import ROWS_AT_ONCE, insert_new, prompts

KINDS: tuple[TaskKind, ...] = ("pair", "label", "rating", "thumbs", "correction")


class Store:
    """Prompts, responses, tasks, leases, judgments, aggregates and datasets in one SQL database.

    Any number of threads and processes may use one database, each process with a Store of its own. A writer waits for
    the others, for `busy_s` at most, and is then refused with the code "busy". Times are seconds since 1970.

    Args:
        place: a path (SQLite, on a local disk) or the URL of a database, such as postgresql+psycopg://...
        now: the clock.
        seed: of what is drawn (sides, gold checks); None for the system's randomness.

    Raises:
        Refused: not_a_store, schema, busy.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        busy_s: float = 30.0,
        now: Callable[[], float] = time.time,
        seed: int | None = None,
    ) -> None:
        self._database = Database(place, busy_s=busy_s)
        self._read, self._write = self._database.read, self._database.write
        self._now = now
        self._rng = random.SystemRandom() if seed is None else random.Random(seed)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What can be judged

    def add_prompt(
        self, text: str, *, name: str = "", domain: str = "", messages: list[dict[str, str]] | None = None
    ) -> str:
        """The id of the prompt; the same name and text are one prompt."""
        row = asking.prompt_row(text, name, domain, messages, self._now())
        self._write(lambda connection: insert_new(connection, prompts, [row]))
        return str(row["id"])

    def add_response(
        self,
        prompt_id: str,
        text: str,
        *,
        source: Source,
        weights_version: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        response_id: str | None = None,
    ) -> str:
        """Its id: `response_id`, or a hash of the text, where it is from and who wrote it."""
        row = asking.response_row(
            prompt_id, text, source=source, now=self._now(),
            weights_version=weights_version, sampling=sampling, response_id=response_id,
        )  # fmt: skip
        return self._write(lambda connection: asking.add_response(connection, row))

    def add_task(
        self,
        kind: TaskKind,
        response_a: str,
        response_b: str | None = None,
        *,
        required_votes: int = 1,
        priority: int = 0,
        score: float = 0.0,
        gold: str | None = None,
        scale: int = 5,
    ) -> str:
        """A question about one response, or two of one prompt. With a `gold` answer it is a check of annotators."""
        return self._write(
            lambda connection: asking.add_task(
                connection, kind, response_a, response_b, required_votes=required_votes, priority=priority,
                score=score, gold=gold, scale=scale, now=self._now(),
            )
        )  # fmt: skip

    def add_pairs(
        self, pairs: Iterable[Pair], *, source: Source, required_votes: int, weights_version: int | None = None
    ) -> ImportReport:
        """Many pairs in one transaction; the tasks keep the ids of the pairs. Identical responses are dropped."""
        options: Any = {"source": source, "required_votes": required_votes, "weights_version": weights_version}
        return self._write(lambda connection: importing.add_pairs(connection, pairs, **options, now=self._now()))

    def add_candidates(
        self, candidates: Iterable[Candidate], *, required_votes: int, gold: bool = False
    ) -> ImportReport:
        """Many pairs in one transaction, as tasks or, with `gold`, as checks whose `first` is the better response."""
        options: Any = {"required_votes": required_votes, "gold": gold, "now": self._now()}
        return self._write(lambda connection: importing.add_candidates(connection, candidates, **options))

    def set_scores(self, scores: Mapping[str, float]) -> int:
        """By task id, of feedback.sampling: the higher, the sooner asked, after priority."""
        return self._write(lambda connection: asking.set_scores(connection, scores))

    # Annotators

    def register(self, name: str) -> tuple[int, str]:
        """(annotator id, token); only a hash of the token is kept."""
        return self._write(lambda connection: people.register(connection, name, now=self._now()))

    def person(self, name: str) -> int:
        """The annotator of that name, made without a token where there is none: someone who is known elsewhere."""
        check_text("name", name, max_chars=300, blank=False)
        return self._write(lambda connection: people.named_annotators(connection, {name}, now=self._now())[name])

    def new_token(self, annotator_id: int) -> str:
        return self._write(lambda connection: people.new_token(connection, annotator_id))

    def authenticate(self, token: str) -> int:
        """The annotator id. Raises Refused (unknown_annotator)."""
        return self._read(lambda connection: people.authenticate(connection, token))

    def set_active(self, annotator_id: int, active: bool) -> None:
        self._write(lambda connection: people.set_active(connection, annotator_id, active))

    def find(self, name: str) -> int:
        """The annotator of that name. Raises Refused (unknown_annotator)."""
        return self._read(lambda connection: people.find(connection, name))

    def everybody(self) -> list[Person]:
        return self._read(people.everybody)

    def export_annotator(self, annotator_id: int) -> dict[str, Any]:
        """All that is stored of one person, ready for JSON."""
        return self._read(lambda connection: people.export(connection, annotator_id))

    def delete_annotator(self, annotator_id: int) -> Gap:
        """Delete one person's data for good; a gap of counted judgments stays."""
        gap = self._write(lambda connection: people.forget(connection, annotator_id, now=self._now()))
        self._database.forget_log()
        return gap

    def gaps(self) -> list[Gap]:
        return self._read(people.all_gaps)

    # Asking and answering

    def next_task(
        self, annotator_id: int, *, lease_s: float = 900.0, gold_rate: float = 0.0, kinds: Collection[str] = KINDS
    ) -> Assignment | None:
        """What this annotator should judge next, leased for `lease_s`; None where nothing is left for them."""
        return self._write(
            lambda connection: asking.next_task(
                connection, annotator_id, now=self._now(), lease_s=lease_s, gold_rate=gold_rate, kinds=kinds,
                rng=self._rng,
            )
        )  # fmt: skip

    def shown_left(self, annotator_id: int, lease_id: str) -> Literal["a", "b"] | None:
        """What was on the left under a lease, also one that ended; None where there was but one response."""
        return self._read(lambda connection: asking.shown_left(connection, annotator_id, lease_id))

    def renew(self, annotator_id: int, lease_id: str, *, lease_s: float = 900.0) -> float:
        """The lease's new deadline."""
        return self._write(
            lambda connection: asking.renew(connection, annotator_id, lease_id, now=self._now(), lease_s=lease_s)
        )

    def release(self, annotator_id: int, lease_id: str) -> None:
        self._write(lambda connection: asking.release(connection, annotator_id, lease_id, now=self._now()))

    def submit(self, annotator_id: int, task_id: str, judgment: Judgment, *, lease_id: str) -> Receipt:
        """One vote; it may be sent again with the same key."""
        return self._write(
            lambda connection: judging.submit(connection, annotator_id, task_id, judgment, lease_id, now=self._now())
        )

    def undo(
        self, annotator_id: int, judgment_id: int, *, idempotency_key: str, lease_s: float = 900.0
    ) -> Assignment | None:
        """Take an own vote back and get the task again (None: nobody had asked for the vote)."""
        asking.check_lease_s(lease_s)
        return self._write(
            lambda connection: judging.undo(
                connection, annotator_id, judgment_id, idempotency_key, now=self._now(), lease_s=lease_s, rng=self._rng
            )
        )

    def judge_served(
        self,
        annotator_id: int,
        kind: TaskKind,
        response_id: str,
        judgment: Judgment,
        *,
        other_response_id: str | None = None,
        shown_left: Literal["a", "b"] | None = None,
        scale: int = 5,
    ) -> Receipt:
        """Feedback at the point of use, on an answer (a), or on it and another one (b). Of each kind one a person."""
        return self._write(
            lambda connection: judging.judge_served(
                connection, annotator_id, kind, response_id, judgment, other_response_id=other_response_id,
                shown_left=shown_left, scale=scale, now=self._now(),
            )
        )  # fmt: skip

    def add_votes(self, votes: Iterable[Vote]) -> tuple[int, dict[str, int]]:
        """Votes on pairs that were not asked for here, of simulated voters say: how many, and dropped by reason."""
        found = [
            ImportedVote(v.pair_id, v.voter, Judgment("imported", choice=v.choice, active_s=v.active_s), v.left)
            for v in votes
        ]

        def add(connection: Connection) -> tuple[int, dict[str, int]]:
            kept, dropped = 0, Counter[str]()
            for part in chunks(found, ROWS_AT_ONCE):
                added, left_out = judging.add_votes(connection, part, now=self._now())
                kept += added
                dropped.update(left_out)
            return kept, dict(dropped)

        return self._write(add)

    def progress(self, annotator_id: int) -> Progress:
        return self._read(lambda connection: asking.progress(connection, annotator_id))

    def totals(self) -> Totals:
        """How far all tasks together are."""
        return self._read(asking.totals)

    # What follows

    def ballots(self, kind: Judged = "pair") -> Ballots:
        """All standing votes as arrays, for feedback.annotators and feedback.crowd_bt."""
        return self._read(lambda connection: results.ballots(connection, kind))

    def gold_checks(self) -> dict[str, tuple[int, int]]:
        """By annotator: gold checks answered right, of how many."""
        return self._read(results.gold_checks)

    def aggregate(self, kind: Judged = "pair", *, method: Method = "dawid_skene") -> AggregateRun:
        """A probability for each task with votes, kept under a new id. Others may write meanwhile."""
        votes = self._read(lambda connection: results.snapshot(connection, kind))
        found = results.aggregated(votes, method)
        return self._write(lambda connection: results.keep_aggregate(connection, votes, method, found, now=self._now()))

    def probabilities(self, aggregate_id: int) -> dict[str, float]:
        """By task id: that a is the better one, or that the response is good."""
        return self._read(lambda connection: results.probabilities(connection, aggregate_id))

    def export_preferences(
        self, name: str, query: DatasetQuery, path: str | Path, *, layout: Layout = "plain"
    ) -> DatasetVersion:
        """Pairs as a preference file (`feedback.formats.write_preferences`), recorded as a version of `name`."""
        return self._export(name, query, results.preferences, partial(write_preferences, path=path, layout=layout))

    def export_unpaired(
        self, name: str, query: DatasetQuery, path: str | Path, *, layout: Layout = "plain"
    ) -> DatasetVersion:
        """Labels of single responses (`feedback.formats.write_unpaired`), recorded as a version of `name`."""
        return self._export(name, query, results.unpaired, partial(write_unpaired, path=path, layout=layout))

    def _export(
        self, name: str, query: DatasetQuery, rows: Any, write: Callable[[Iterator[Any]], object]
    ) -> DatasetVersion:
        """`rows(connection, query, dropped)` into a file, and what it holds into the table of versions."""
        content, dropped = results.ContentHash(), Counter[str]()
        self._read(lambda connection: write(content.through(rows(connection, query, dropped))))
        return self._write(lambda c: results.keep_dataset(c, name, query, content, dropped, now=self._now()))

    def dataset_versions(self, name: str) -> Sequence[DatasetVersion]:
        return self._read(lambda connection: results.dataset_versions(connection, name))

    def import_preferences(
        self, path: str | Path, *, truncate: Truncate | None = None, required_votes: int = 0
    ) -> ImportReport:
        """All of a preference file or nothing: other writers wait meanwhile. Raises ConfigError, naming the line."""
        options: Any = {"truncate": truncate, "required_votes": required_votes, "now": self._now()}
        return self._write(lambda c: importing.import_preferences(c, Path(path), **options))

    def import_unpaired(
        self, path: str | Path, *, truncate: Truncate | None = None, required_votes: int = 0
    ) -> ImportReport:
        """The same for `prompt`, `completion`, `label`."""
        options: Any = {"truncate": truncate, "required_votes": required_votes, "now": self._now()}
        return self._write(lambda c: importing.import_unpaired(c, Path(path), **options))

    def import_votes(self, path: str | Path, *, voters: str) -> ImportReport:
        """Votes of a file on tasks that are here; `voters` says whose, before each name."""
        return self._write(lambda c: importing.import_votes(c, Path(path), voters=voters, now=self._now()))
