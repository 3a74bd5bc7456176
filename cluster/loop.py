"""The closed loop: rounds of asking about the current policy, learning a reward from all votes so far, and PPO on it.

The first round's votes and reward model come before training, as in any run with `preferences`. Each later round
begins between two steps, while responses go on being sampled: the policy is evaluated, pairs of its responses are
judged, a reward model is trained on all comparisons so far, the replicas change to it (reward_rollout.py), and what
waits for the learner is scored again.
rounds.json says what each round asked, learnt and gained; a resumed run goes on from it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.reward import BadSample
from cluster.asking import Question, ask
from cluster.evaluate import Evaluation, evaluate, from_record, intervals, record
from cluster.intervals import Interval, mean_interval
from cluster.job import Job
from cluster.preferences import train_on
from cluster.reward_rollout import roll_out
from cluster.run_log import write_json
from contracts.loop import LoopConfig
from contracts.records import SCHEMA_VERSION, Prompt, ScoredRollout

FILE = "rounds.json"


@dataclass(frozen=True)
class Loop:
    """The rounds of a run; `prompts` are those that people, or the panel, are asked with."""

    config: LoopConfig
    prompts: Sequence[Prompt]

    async def next_round(self, job: Job) -> bool:
        """Where the next round is due, end this one and begin that one, and say so; else nothing.

        A wish to stop ends it at once: people may take days. A resumed run begins the round again, and no vote is lost.
        """
        rounds = read(job.config.output_dir) or [self._first(job)]
        due = len(rounds) + 1
        if due > self.config.rounds or job.version < self.config.begins(due, job.config.steps):
            return False
        turn = asyncio.create_task(self._turn(job, rounds, due))
        told = asyncio.create_task(job.stopping.wait())
        try:
            await asyncio.wait({turn, told}, return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                turn.result()
        finally:
            turn.cancel()
            told.cancel()
            await asyncio.gather(turn, told, return_exceptions=True)
        await job.notify()
        return True

    async def _turn(self, job: Job, rounds: list[dict[str, Any]], due: int) -> None:
        await self._end(job, rounds, await evaluate(job))
        await job.notify()  # the evaluation had the workers' places: groups may start there again
        await self._begin(job, rounds, due)
        name, batch_size = job.config.algorithm.name.upper(), job.config.training.batch_size
        job.progress.phase(f"Round {due} of {self.config.rounds}: training with {name}, {batch_size} responses a step")

    async def finish(self, job: Job, evaluation: Evaluation) -> None:
        """The last round is over, and the policy was evaluated."""
        await self._end(job, read(job.config.output_dir) or [self._first(job)], evaluation)

    def _first(self, job: Job) -> dict[str, Any]:
        asked = json.loads((job.config.output_dir / "preferences.json").read_text(encoding="utf-8"))
        return _begun(1, 0, asked)

    async def _begin(self, job: Job, rounds: list[dict[str, Any]], number: int) -> None:
        config, folder = job.config, round_folder(job.config.output_dir, number)
        question = Question(number, job.version, folder / "preferences.parquet")
        preferences = await ask(config, self.prompts, job.pool, question, progress=job.progress)
        await job.notify()
        # A resumed run starts with what was rolled out last: nothing is removed that an attempt before may have left.
        attempt = 1 + sum(1 for _ in folder.glob("reward_model-*"))
        reward_model = folder / f"reward_model-{attempt}"
        asked = await train_on(config, preferences, reward_model, progress=job.progress)
        for component in (*config.rewards, *config.evaluation.judges):
            if component.model == "preferences":
                await roll_out(job, component.name, reward_model)
        await self._score_again(job)
        _write(job, [*rounds, _begun(number, job.version, asked)])

    async def _score_again(self, job: Job) -> None:
        """What waits in the queue for the learner was scored before the round, by the reward model before."""
        prompts = {prompt.prompt_id: prompt for prompt in self.prompts}

        async def score(sample: ScoredRollout) -> ScoredRollout:
            rollout = sample.rollout
            try:
                return ScoredRollout(
                    rollout,
                    *await job.rewards.score(prompts[rollout.prompt_id], rollout.response_text),
                    sample.reference_logprobs,
                )
            except BadSample:  # it could be scored before: the old score stays, and reward_version says whose it is
                return sample

        for group in job.queue.groups:
            again = await asyncio.gather(*(score(sample) for sample in group.samples))
            job.queue.replace(replace(group, samples=tuple(again)))

    async def _end(self, job: Job, rounds: list[dict[str, Any]], evaluation: Evaluation) -> None:
        """Adds to the newest round what it gained."""
        run_dir, newest = job.config.output_dir, rounds[-1]
        kept = _evaluation_file(run_dir, newest["round"])
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, record(evaluation))
        newest["ended_at_step"] = job.version
        newest["evaluation"] = {name: found.record() for name, found in intervals(evaluation).items()}
        newest["roles"] = evaluation.roles
        if newest["round"] > 1:
            first = from_record(json.loads(_evaluation_file(run_dir, 1).read_text(encoding="utf-8")))
            by, won = await _win_rate(job, first, evaluation)
            newest["win_rate"] = {"against_round": 1, "judged_by": by, **won.record()}
            job.progress.note(
                f"round {newest['round']} against round 1, judged by {by}: wins {won.mean:.0%} of {won.n} held-out "
                f"prompts (95 % interval {won.low:.0%} to {won.high:.0%})"
            )
        _write(job, rounds)


async def _win_rate(job: Job, first: Evaluation, newest: Evaluation) -> tuple[str, Interval]:
    """Share of held-out prompts on which the newest policy's response is the better one, ties a half; and who says so.

    The first gold judge where there is one: its scores of both rounds can be compared. Else the newest reward, which
    scores the first round's responses again: those of two reward models have no common scale.
    """
    prompts = {prompt.prompt_id: prompt for prompt in job.eval_prompts}
    rows = {prompt_id: row for row, prompt_id in enumerate(first.prompt_ids)}
    both = [(rows[prompt_id], row) for row, prompt_id in enumerate(newest.prompt_ids) if prompt_id in rows]
    gold = next((name for name, role in newest.roles.items() if role == "gold"), None)
    if gold is not None:
        pairs = [(first.values[gold][a], newest.values[gold][b]) for a, b in both]
        return gold, mean_interval([_won(before, after) for before, after in pairs])

    async def score(evaluation: Evaluation, row: int) -> float | None:
        try:
            return (await job.rewards.score(prompts[evaluation.prompt_ids[row]], evaluation.responses[row]))[0]
        except BadSample:
            return None

    scores = await asyncio.gather(*(asyncio.gather(score(first, a), score(newest, b)) for a, b in both))
    return "the newest reward", mean_interval([_won(a, b) for a, b in scores if a is not None and b is not None])


def _won(before: float, after: float) -> float:
    return float(after > before) + 0.5 * float(after == before)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The rounds that have begun; none where there is no file."""
    file = run_dir / FILE
    if not file.is_file():
        return []
    rounds: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rounds"]
    return rounds


def round_folder(run_dir: Path, number: int) -> Path:
    return run_dir / "rounds" / f"round-{number:02d}"


def _evaluation_file(run_dir: Path, number: int) -> Path:
    return round_folder(run_dir, number) / "evaluation.json"


def _begun(number: int, version: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Row of a round; `asked` is what preferences.json holds."""
    kept = ("simulated", "pairs", "votes", "dropped", "agreement_with_gold", "reward_model")
    return {"round": number, "began_at_step": version, **{name: asked[name] for name in kept}}


def _write(job: Job, rounds: list[dict[str, Any]]) -> None:
    write_json(job.config.output_dir / FILE, {"schema_version": SCHEMA_VERSION, "rounds": rounds})
