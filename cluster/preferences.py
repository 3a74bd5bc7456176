"""Before PPO: comparisons from a file or from a simulated panel, and the reward model trained on them.

The simulated voters stand in for people and are called simulated wherever they appear. They see the hidden gold
judge through their own reliability; training sees their votes alone.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from actors.admission import BadRollout
from actors.pool import RolloutPool
from actors.reward import ScoreRequest, call_function, load_function
from actors.rollout import RolloutRequest
from cluster.progress import Progress
from cluster.run_log import write_json
from cluster.together import generate_together
from contracts.config import Config, ConfigError, SimulatedVotes
from contracts.records import Comparison, Prompt, Rollout
from contracts.seeds import derive_seed
from contracts.waiting import answer
from feedback.formats import read_preferences, write_preferences, write_unpaired
from feedback.judged_files import read_judged
from feedback.quality import Aggregate, UnpairedLabel, dawid_skene
from feedback.simulate import Pair, Vote, simulate_votes
from feedback.store import DatasetQuery, Store
from learner.rank import training_environment
from learner.reward_model import RewardModelReport, train_reward_model


@dataclass(frozen=True)
class Preferences:
    """Comparisons and how they came about."""

    comparisons: list[Comparison]
    dropped: dict[str, int]
    pairs: int
    votes: int
    voters: dict[str, float]
    agreement_with_gold: float | None
    labels: list[UnpairedLabel] = field(default_factory=list)


def _preference_file(run_dir: Path) -> Path:
    return run_dir / "preferences.parquet"


def trained_reward_model(run_dir: Path) -> Path:
    return run_dir / "reward_model"


async def prepare_reward_model(
    config: Config, prompts: Sequence[Prompt], pool: RolloutPool, *, progress: Progress
) -> None:
    """Collect comparisons, write them as preferences.parquet, train the reward model on them.

    Raises:
        ConfigError: too few comparisons are left to train on.
    """
    section = config.preferences
    assert section is not None
    if section.simulate is not None:
        preferences = await _ask_simulated_panel(config, section.simulate, prompts, pool, progress)
    else:
        judged = await asyncio.to_thread(read_judged, section.paths)
        preferences = Preferences(judged.comparisons, judged.dropped, judged.rows, 0, {}, None, judged.labels)
        write_preferences(judged.comparisons, _preference_file(config.output_dir))
        if judged.labels:
            write_unpaired(judged.labels, config.output_dir / "labels.parquet")
    labels = f" and {len(preferences.labels)} labels" if preferences.labels else ""
    progress.phase(f"Training the reward model on {len(preferences.comparisons)} comparisons{labels}")
    report = await _train(config, preferences, progress=progress)
    write_json(config.output_dir / "preferences.json", _record(preferences, report, section.simulate is not None))
    progress.note(
        f"reward model: right on {report.held_out_accuracy:.0%} of {report.held_out_pairs} held-out comparisons "
        f"(95 % interval {report.held_out_accuracy_low:.0%} to {report.held_out_accuracy_high:.0%}), "
        f"{report.seconds:.0f} s"
    )


async def _ask_simulated_panel(
    config: Config, panel: SimulatedVotes, prompts: Sequence[Prompt], pool: RolloutPool, progress: Progress
) -> Preferences:
    progress.phase(f"Sampling {panel.pairs} pairs of responses for the simulated voters")
    asked = [prompts[index % len(prompts)] for index in range(panel.pairs)]
    both = await sample(
        config, [prompt for prompt in asked for _ in range(2)], pool, purpose="pairs", progress=progress
    )
    pairs = [
        Pair(
            f"pair-{index:05d}", prompt.prompt_id, prompt.text, first.response_text, second.response_text, prompt.domain
        )
        for index, (prompt, first, second) in enumerate(zip(asked, both[::2], both[1::2], strict=True))
    ]
    gold_a, gold_b = await asyncio.gather(
        *(asyncio.to_thread(_gold, panel.gold, asked, rollouts) for rollouts in (both[::2], both[1::2]))
    )
    votes = simulate_votes(pairs, gold_a, gold_b, panel, seed=derive_seed(config.seed, "votes"))
    found, aggregate = await asyncio.to_thread(_through_the_store, config.output_dir, pairs, votes, panel)
    agreement = _agreement(aggregate, pairs, gold_a, gold_b)
    progress.note(
        f"{found.votes} votes from {len(found.voters)} simulated voters (not people) on {len(pairs)} pairs: "
        f"{len(found.comparisons)} comparisons, {agreement:.0%} of them as the hidden gold judge has it; dropped: "
        f"{found.dropped or 'none'}"
    )
    return replace(found, agreement_with_gold=agreement)


def _through_the_store(
    run_dir: Path, pairs: Sequence[Pair], votes: Sequence[Vote], panel: SimulatedVotes
) -> tuple[Preferences, Aggregate]:
    """The way of people's votes: tasks and judgments in a store, aggregated there, exported as a preference file."""
    place = run_dir / "simulated_votes.sqlite"
    for left in run_dir.glob(f"{place.name}*"):  # of an attempt that was killed, whose pairs were others
        left.unlink()
    with Store(place) as store:
        asked = store.add_pairs(pairs, source="live", required_votes=panel.votes_per_pair, weights_version=0)
        kept, _ = store.add_votes(votes)
        query = DatasetQuery(store.aggregate("pair").aggregate_id)
        exported = store.export_preferences("simulated", query, _preference_file(run_dir))
        aggregate = dawid_skene(store.ballots("pair"))
    rows, _ = read_preferences(_preference_file(run_dir))
    dropped = Counter(asked.dropped) + Counter(exported.dropped)
    return Preferences(rows, dict(dropped), len(pairs), kept, dict(aggregate.reliability), None), aggregate


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


async def _train(config: Config, preferences: Preferences, *, progress: Progress) -> RewardModelReport:
    section = config.preferences
    assert section is not None
    base = section.reward_model.base or config.model.path  # as configured: the reward card names it
    worker = config.reward_workers
    # One call a worker: the process ends with the training, and its gigabytes with it.
    task: Any = ray.remote(max_calls=1, max_retries=0)(_train_remotely)  # type: ignore[arg-type]
    ref = task.options(
        num_cpus=worker.num_cpus,
        num_gpus=worker.num_gpus,
        resources=dict(worker.resources),
        runtime_env={"env_vars": training_environment()},
    ).remote(
        preferences.comparisons,
        section.reward_model,
        labels=preferences.labels,
        base=base,
        output_dir=str(trained_reward_model(config.output_dir).resolve()),
        seed=config.seed,
        threads=worker.threads,
        device="cuda" if worker.num_gpus else "cpu",
    )
    progress.waiting("the reward model's training")
    try:
        report: RewardModelReport = await answer(
            ref, who="the reward model's trainer", asked="finish", deadline_s=config.deadlines.learn_s
        )
    except ValueError as error:
        raise ConfigError(f"preferences: {error}") from error
    finally:
        progress.waiting("")
    return report


def _train_remotely(
    rows: list[Comparison], config: Any, *, output_dir: str, threads: int | None, **options: Any
) -> RewardModelReport:
    threads = threads or os.cpu_count()  # Ray lets a worker have one by default
    return train_reward_model(rows, config, output_dir=Path(output_dir), threads=threads, **options)


def _record(preferences: Preferences, report: RewardModelReport, simulated: bool) -> dict[str, Any]:
    accuracy = {
        "mean": report.held_out_accuracy,
        "low": report.held_out_accuracy_low,
        "high": report.held_out_accuracy_high,
        "n": report.held_out_prompts,
    }
    reward_model = {"held_out_accuracy": accuracy, "reward_version": report.reward_version}
    recorded = ("train_pairs", "train_labels", "held_out_pairs", "held_out_loss", "held_out_calibrated_loss", "seconds")
    reward_model |= {name: asdict(report)[name] for name in recorded}
    return {
        "schema_version": 1,
        "simulated": simulated,
        "pairs": preferences.pairs,
        "votes": preferences.votes,
        "dropped": preferences.dropped,
        "voters": preferences.voters,
        "agreement_with_gold": preferences.agreement_with_gold,
        "reward_model": reward_model,
    }
