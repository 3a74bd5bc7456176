"""Asking about a policy: pairs of its responses, votes on them, and the comparisons that the votes add up to.

People vote at the page of `headrace label`, which works on the same feedback store. Simulated voters stand in for
people and are called simulated wherever they appear: they see the hidden gold judge through their own reliability,
training sees their votes alone. Either way the votes go through the store and are aggregated there.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from actors.admission import BadRollout
from actors.pool import RolloutPool
from actors.reward import ScoreRequest, call_function, load_function
from actors.rollout import RolloutRequest
from cluster.progress import Progress
from cluster.together import generate_together
from contracts.clock import now
from contracts.config import Config, ConfigError
from contracts.preferences import PeopleVotes, SimulatedVotes
from contracts.records import Comparison, Prompt, Rollout
from contracts.seeds import derive_seed
from feedback.formats import read_preferences
from feedback.quality import Aggregate, UnpairedLabel, dawid_skene
from feedback.simulate import Pair, Vote, simulate_votes
from feedback.store import DatasetQuery, Store

_LOOK_AGAIN_S = 10.0  # each look reads all votes of the store, and people take hours


@dataclass(frozen=True)
class Preferences:
    """Comparisons and how they came about. `pairs` were asked about this time; votes and voters are all so far."""

    comparisons: list[Comparison]
    dropped: dict[str, int]
    pairs: int
    votes: int
    voters: dict[str, float]
    agreement_with_gold: float | None
    labels: list[UnpairedLabel] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """Which time it is that the policy is asked about (from 1), the version that answers, and where the preference
    file with all comparisons so far goes."""

    round: int
    version: int
    file: Path


async def ask(
    config: Config, prompts: Sequence[Prompt], pool: RolloutPool, question: Question, *, progress: Progress
) -> Preferences:
    """Sample pairs from the policy that the engines serve, have them judged, and write the comparisons so far.

    Raises:
        ConfigError: people were asked, and too few answered in time.
    """
    section = config.preferences
    assert section is not None
    if section.simulate is not None:
        return await _ask_simulated_panel(config, section.simulate, prompts, pool, question, progress)
    assert section.people is not None
    return await _ask_people(config, section.people, prompts, pool, question, progress)


async def _ask_simulated_panel(
    config: Config,
    panel: SimulatedVotes,
    prompts: Sequence[Prompt],
    pool: RolloutPool,
    question: Question,
    progress: Progress,
) -> Preferences:
    progress.phase(f"Sampling {panel.pairs} pairs of responses for the simulated voters")
    asked, first, second = await _two_responses(config, panel.pairs, prompts, pool, question, progress)
    # The first round's store begins empty, and a deterministic run gives its pairs the same names each time.
    pairs = _pairs("pair" if question.round == 1 else _new_name(question), asked, first, second)
    gold_a, gold_b = await asyncio.gather(
        *(asyncio.to_thread(_gold, panel.gold, asked, rollouts) for rollouts in (first, second))
    )
    votes = simulate_votes(pairs, gold_a, gold_b, panel, seed=derive_seed(config.seed, "votes", question.round))
    found, aggregate = await asyncio.to_thread(_through_the_store, config.output_dir, pairs, votes, panel, question)
    agreement = _agreement(aggregate, pairs, gold_a, gold_b)
    progress.note(
        f"{len(votes)} votes of simulated voters (not people) on {len(pairs)} pairs: {len(found.comparisons)} "
        f"comparisons so far, {agreement:.0%} of the new ones as the hidden gold judge has it; dropped: "
        f"{found.dropped or 'none'}"
    )
    return replace(found, agreement_with_gold=agreement)


async def _ask_people(
    config: Config,
    people: PeopleVotes,
    prompts: Sequence[Prompt],
    pool: RolloutPool,
    question: Question,
    progress: Progress,
) -> Preferences:
    progress.phase(f"Sampling {people.pairs} pairs of responses for people to judge")
    both = await _two_responses(config, people.pairs, prompts, pool, question, progress)
    pairs = _pairs(_new_name(question), *both)
    given_out = await asyncio.to_thread(_give_out, people, pairs, question)
    progress.phase(f"Waiting for people: {given_out} pairs in {people.store}, {people.votes_per_pair} votes each")
    expires = now() + people.wait_s
    while (judged := await asyncio.to_thread(_judged, people, pairs)) < given_out and now() < expires:
        left = f"{(expires - now()) / 3600:.1f} h left"
        progress.waiting(f"votes: {judged} of {given_out} pairs have all, {left}; they vote at `headrace label`")
        await asyncio.sleep(_LOOK_AGAIN_S)
    progress.waiting("")
    found = await asyncio.to_thread(_what_people_said, people, len(pairs), question)
    if len(found.comparisons) < people.min_comparisons:
        raise ConfigError(
            f"preferences.people: {len(found.comparisons)} comparisons in {people.store} after {people.wait_s:g} s, "
            f"needed are {people.min_comparisons} (min_comparisons); nothing of it is lost: start `headrace label` on "
            "that store, and continue with resume=true"
        )
    progress.note(
        f"people: all votes on {judged} of {given_out} pairs; {len(found.comparisons)} comparisons so far from "
        f"{found.votes} votes of {len(found.voters)} people; dropped: {found.dropped or 'none'}"
    )
    return found


async def _two_responses(
    config: Config, num_pairs: int, prompts: Sequence[Prompt], pool: RolloutPool, question: Question, progress: Progress
) -> tuple[list[Prompt], list[Rollout], list[Rollout]]:
    """The prompts go on where those of the round before ended."""
    start = (question.round - 1) * num_pairs
    asked = [prompts[index % len(prompts)] for index in range(start, start + num_pairs)]
    purpose = "pairs" if question.round == 1 else f"pairs-{question.round}"
    both = await sample(config, [each for each in asked for _ in range(2)], pool, purpose=purpose, progress=progress)
    return asked, both[::2], both[1::2]


def _new_name(question: Question) -> str:
    """A round that was killed asks again, about other responses: those that it had asked about keep their votes."""
    return f"round-{question.round}-{uuid.uuid4().hex[:8]}"


def _pairs(name: str, prompts: Sequence[Prompt], first: Sequence[Rollout], second: Sequence[Rollout]) -> list[Pair]:
    return [
        Pair(f"{name}-{index:05d}", prompt.prompt_id, prompt.text, a.response_text, b.response_text, prompt.domain)
        for index, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True))
    ]


def _through_the_store(
    run_dir: Path, pairs: Sequence[Pair], votes: Sequence[Vote], panel: SimulatedVotes, question: Question
) -> tuple[Preferences, Aggregate]:
    place = run_dir / "simulated_votes.sqlite"
    if question.round == 1:
        for left in run_dir.glob(f"{place.name}*"):  # of an attempt that was killed, whose pairs were others
            left.unlink()
    with Store(place) as store:
        asked = store.add_pairs(
            pairs, source="live", required_votes=panel.votes_per_pair, weights_version=question.version
        )
        store.add_votes(votes)
        return _comparisons(store, len(pairs), asked.dropped, question)


def _give_out(people: PeopleVotes, pairs: Sequence[Pair], question: Question) -> int:
    """How many can be judged: identical responses tell nothing."""
    needed, version = people.votes_per_pair, question.version
    with Store(people.store) as store:
        return store.add_pairs(pairs, source="live", required_votes=needed, weights_version=version).kept


def _judged(people: PeopleVotes, pairs: Sequence[Pair]) -> int:
    """How many pairs have all their votes."""
    with Store(people.store) as store:
        ballots = store.ballots("pair")
    votes = Counter(ballots.pair_ids[pair] for pair in ballots.pairs_N)
    return sum(votes[pair.pair_id] >= people.votes_per_pair for pair in pairs)


def _what_people_said(people: PeopleVotes, num_pairs: int, question: Question) -> Preferences:
    with Store(people.store) as store:
        return _comparisons(store, num_pairs, {}, question)[0]


def _comparisons(
    store: Store, num_pairs: int, dropped: dict[str, int], question: Question
) -> tuple[Preferences, Aggregate]:
    query = DatasetQuery(store.aggregate("pair").aggregate_id, min_votes=1)
    question.file.parent.mkdir(parents=True, exist_ok=True)
    exported = store.export_preferences(f"round-{question.round}", query, question.file)
    ballots = store.ballots("pair")
    aggregate = dawid_skene(ballots)
    rows, _ = read_preferences(question.file)
    counts = dict(Counter(dropped) + Counter(exported.dropped))
    votes = len(ballots.pairs_N)
    return Preferences(rows, counts, num_pairs, votes, dict(aggregate.reliability), None), aggregate


async def sample(
    config: Config, prompts: Sequence[Prompt], pool: RolloutPool, *, purpose: str, progress: Progress
) -> list[Rollout]:
    """One response to each prompt, outside the training stream and in the order of the prompts."""
    done = 0
    requests = [
        RolloutRequest(
            trajectory_id=f"{purpose}-{index}",
            prompt_id=prompt.prompt_id,
            group_id=purpose,
            prompt_tokens=prompt.tokens,
            max_tokens=config.sampling.max_response_tokens,
            temperature=config.sampling.temperature,
            seed=derive_seed(config.seed, purpose, index),
        )
        for index, prompt in enumerate(prompts)
    ]

    async def one(request: RolloutRequest) -> Rollout:
        nonlocal done
        rollout = await pool.generate_somewhere(request, deadline_s=config.deadlines.lease_s)
        done += 1
        progress.waiting(f"responses: {done} of {len(prompts)}" if done < len(prompts) else "")
        return rollout

    if not config.deterministic:
        return list(await asyncio.gather(*(one(request) for request in requests)))
    progress.waiting(f"{len(requests)} responses")
    found = await generate_together(pool, config, [[request] for request in requests])
    progress.waiting("")
    if bad := [each for each in found.values() if isinstance(each, BadRollout)]:
        raise bad[0]
    return [each for each in found.values() if isinstance(each, Rollout)]


def _gold(function: str, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[float]:
    requests = [
        ScoreRequest(list(prompt.messages), prompt.text, rollout.response_text, prompt.columns)
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
    return call_function(load_function(function), requests)


def _agreement(aggregate: Aggregate, pairs: Sequence[Pair], gold_a: Sequence[float], gold_b: Sequence[float]) -> float:
    """Share of decided pairs, gold ties aside, on which the aggregate names the side that gold scores higher."""
    decided = [
        (aggregate.probability_a[pair.pair_id] > 0.5) == (a > b)
        for pair, a, b in zip(pairs, gold_a, gold_b, strict=True)
        if a != b and aggregate.probability_a.get(pair.pair_id, 0.5) != 0.5
    ]
    return sum(decided) / len(decided) if decided else 0.0
