"""`headrace label`: the labelling page and its API on Ray Serve, in front of a feedback store, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException

from actors.applications import delete_application, run_application
from actors.prompts import read_rows
from actors.replicas import watch
from cluster import launch
from cluster.http_door import check_port, url_of
from cluster.live_pairs import LivePairs
from cluster.pair_sources import candidates
from cluster.progress import Progress
from contracts.config import ConfigError, LabellingRun
from contracts.events import Event, first_line
from contracts.labelling import LabellingConfig
from contracts.stopping import StopRequest
from contracts.waiting import NoAnswer, answer
from feedback.formats import stream_preferences
from feedback.sampling import plan_to_predict, variety, without_near_duplicates
from feedback.store import Candidate, ImportReport, Refused, Store, Written
from feedback.store.database import absolute, file_of
from serving.labelling import build
from serving.labelling.views import guidelines, offensive_words

LOOK_S = 5.0
_AT_ONCE = 2_000
_NOT_THERE = (NoAnswer, RayActorError, RayTaskError, RayServeException)
log = logging.getLogger("headrace.labelling")


@dataclass(frozen=True)
class LabelJob:
    """What is checked before Ray starts; the store is there, and holds the tasks."""

    run: LabellingRun
    store: str  # for any process, whatever its working directory
    notes: tuple[str, ...]

    @property
    def application(self) -> str:
        return f"headrace-labelling-{self.run.labelling.port}"


def check_labelling(run: LabellingRun) -> LabelJob:
    """Check the settings, open the store (a new one is made) and put the pairs into it.

    Raises:
        ConfigError: one line that names the field and what to do. Of a file that is wrong nothing is in the store.
    """
    labelling = run.labelling
    check_port(labelling.host, labelling.port, section="labelling")
    for field, path, read in (
        ("guidelines", labelling.guidelines, guidelines),
        ("offensive_words", labelling.offensive_words, offensive_words),
    ):
        try:
            read(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"labelling.{field}: {path} cannot be read: {error}") from error
    for source in labelling.pairs:
        if source.policy is not None:
            read_rows(source.policy.prompts)
    try:
        place = absolute(labelling.store)
        if run.ray.address is not None and file_of(place) is not None:
            raise ConfigError(
                f"labelling.store: {labelling.store} is a file of this machine, and on {run.ray.address} the page "
                "may run on another one: give the URL of a PostgreSQL, or leave ray.address out"
            )
        with Store(place) as store:
            return LabelJob(run, place, tuple(_fill(store, labelling)))
    except Refused as refused:
        raise ConfigError(f"labelling.store: {refused}") from refused


def _fill(store: Store, labelling: LabellingConfig) -> Iterator[str]:
    """Put tasks into the store, and say what became of each source."""
    if labelling.gold is not None:
        dropped: Counter[str] = Counter()
        yield f"{labelling.gold}: {_added(store, _gold(labelling.gold, dropped), dropped, 0, gold=True)}"
    for source in labelling.pairs:
        if source.policy is None:
            dropped = Counter()
            found = _ordered(candidates(source, dropped), labelling, dropped)
            where = source.file or source.run or " and ".join(map(str, source.evaluations or ()))
            yield f"{where}: {_added(store, found, dropped, labelling.required_votes, gold=False)}"
    if not any(person.has_token and person.active for person in store.everybody()):
        yield f"nobody can sign in yet: headrace annotator NAME --store {labelling.store} makes a token"
    live = any(source.policy is not None for source in labelling.pairs)
    if not live and not store.totals().open_tasks:
        yield "no task waits for votes: give labelling.pairs, or raise labelling.required_votes for new ones"


def _added(store: Store, found: Iterator[Candidate], dropped: Counter[str], votes: int, *, gold: bool) -> str:
    report: ImportReport = store.add_candidates(found, required_votes=votes, gold=gold)
    left_out = dropped + Counter(report.dropped)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
    known = f", {report.known} were there already" if report.known else ""
    what = "gold checks" if gold else "pairs"
    return f"{report.kept} new {what}{known}" + (f"; left out: {reasons}" if reasons else "")


def _gold(path: Path, dropped: Counter[str]) -> Iterator[Candidate]:
    for row in stream_preferences(path, dropped):
        first, second = Written(row.chosen), Written(row.rejected)
        yield Candidate(row.prompt, first, second, "file", prompt_name=row.prompt_id, domain=row.domain)


def _ordered(found: Iterator[Candidate], labelling: LabellingConfig, dropped: Counter[str]) -> Iterator[Candidate]:
    """With the scores that put them in the order of `labelling.asking`, without too many of a kind.

    `varied` and `to_predict` look at so many pairs at once as are read at once: no more of a long file is in memory.
    """
    if labelling.near_duplicates is not None:
        every = list(found)
        texts = [f"{one.prompt}\n{one.first.text}\n{one.second.text}" for one in every]
        kept = without_near_duplicates(texts, at_most=labelling.near_duplicates, seed=labelling.seed)
        dropped["near duplicate"] += len(every) - len(kept)
        found = iter([every[index] for index in kept])
    number = 0
    while part := list(islice(found, _AT_ONCE)):
        first, second = [one.first.text for one in part], [one.second.text for one in part]
        if labelling.asking == "varied":
            scores = variety(first, second).tolist()
        elif labelling.asking == "to_predict":
            places = np.argsort(plan_to_predict(first, second))
            scores = [-float(number + place) for place in places]
        elif labelling.asking == "random":
            scores = [_lot(one, labelling.seed) for one in part]
        else:
            scores = [-float(number + index) for index in range(len(part))]
        number += len(part)
        yield from (replace(one, score=score) for one, score in zip(part, scores, strict=True))


def _lot(candidate: Candidate, seed: int) -> float:
    """Between 0 and 1, the same for the same pair."""
    texts = sorted((candidate.first.text, candidate.second.text))
    drawn = sha256("\0".join((str(seed), candidate.prompt_name, candidate.prompt, *texts)).encode()).digest()
    return int.from_bytes(drawn[:6], "big") / 2**48


async def label(job: LabelJob, progress: Progress, stopping: StopRequest) -> None:
    """Give tasks out until `stopping`; then requests that run are answered, and nothing of the application is left.

    Waits for Ray and the application's start (`deadlines.start_s`), then for the wish to stop.
    """
    run, labelling = job.run, job.run.labelling
    for note in job.notes:
        progress.note(note)
    paths = {
        name: path.resolve()
        for name in ("guidelines", "offensive_words")
        if (path := getattr(labelling, name)) is not None
    }
    served = labelling.model_copy(update={"store": job.store, "pairs": (), **paths})
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(launch.cluster(run, job.application, progress, learner_only=True))
        start = asyncio.to_thread(launch.start_serve)
        await answer(start, who="Ray Serve", asked="start", deadline_s=run.deadlines.start_s)
        stack.push_async_callback(_remove, job)
        progress.phase("Starting the labelling page")
        await run_application(build(served), job.application, start_s=run.deadlines.start_s)
        store = stack.enter_context(Store(job.store))
        progress.phase(f"Labelling, votes go to {labelling.store}")
        progress.result(_where(labelling))
        stopping.graceful = True
        await _until_stopped(job, store, progress, stopping)
        progress.waiting("")
        progress.phase("Finishing the requests that run")
        await delete_application(job.application, deadline_s=labelling.request_s + run.deadlines.stop_s)
        said = store.totals()
        progress.result(f"{said.votes} of {said.required_votes} votes are in {labelling.store}")


async def _until_stopped(job: LabelJob, store: Store, progress: Progress, stopping: StopRequest) -> None:
    """Ends with the wish to stop, or raises with the application."""

    def tell(event: Event) -> None:
        progress.warn(f"{event.who}: {event.cause}; {event.consequence}")

    silent_s, votes = job.run.deadlines.silent_s, job.run.labelling.required_votes
    lives = [
        LivePairs(source.policy, store, required_votes=votes, on_event=tell)
        for source in job.run.labelling.pairs
        if source.policy is not None
    ]
    watching = asyncio.create_task(watch({job.application: "the labelling page"}, on_event=tell, deadline_s=silent_s))
    told = asyncio.create_task(stopping.wait())
    beside = [asyncio.create_task(_show_votes(store, progress))]
    beside += [asyncio.create_task(live.keep_open()) for live in lives]
    running = {watching, told, *beside}
    try:
        while not told.done():
            ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
    finally:
        for task in (watching, told, *beside):
            task.cancel()


async def _show_votes(store: Store, progress: Progress) -> None:
    """How far the votes are, for as long as people label."""
    while True:
        of_all = await asyncio.to_thread(store.totals)
        progress.waiting(f"votes: {of_all.votes} of {of_all.required_votes}, {of_all.open_tasks} tasks open")
        await asyncio.sleep(LOOK_S)


async def _remove(job: LabelJob) -> None:
    try:
        await delete_application(job.application, deadline_s=job.run.deadlines.stop_s)
    except _NOT_THERE as error:
        log.warning("Serve application %s may be left: %s", job.application, first_line(error))


def _where(labelling: LabellingConfig) -> str:
    url = url_of(labelling.host, labelling.port)
    return (
        f"Labelling page: {url}/\nAPI:            {url}/api/openapi.json\n"
        f"Annotators sign in with the token of `headrace annotator NAME --store {labelling.store}`\n"
        "Ctrl-C finishes what runs and stops; again to stop at once"
    )
