"""Held-out prompts before and after training, the same prompts and seeds both times: scores, KL, length.

KL is estimated from the sampled tokens (k1, Schulman 2020), so responses are drawn at the training temperature.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from actors.pool import RolloutPool
from actors.reference import ReferenceModel
from actors.reward import BadSample, Reward, RewardComponents
from cluster.asking import sample
from cluster.intervals import Interval, mean_interval, paired_difference
from cluster.progress import Progress
from cluster.together import reference_together, score_together
from contracts.config import Config
from contracts.records import SCHEMA_VERSION, Prompt, Rollout


class Evaluated(Protocol):
    """What an evaluation needs of a running job."""

    config: Config
    eval_prompts: list[Prompt]
    pool: RolloutPool
    rewards: RewardComponents
    judges: RewardComponents
    reference: ReferenceModel
    progress: Progress
    version: int


@dataclass(frozen=True)
class Evaluation:
    """One value a prompt and metric, in the order of the prompts, and one response a prompt to show."""

    version: int
    prompt_ids: list[str]
    prompts: list[str]
    responses: list[str]
    scores: list[dict[str, float]]
    roles: dict[str, str]
    values: dict[str, list[float]]


async def evaluate(job: Evaluated) -> Evaluation:
    """Sample, score and measure every held-out prompt with the policy that the engines serve.

    Prompts of which a response cannot be scored are left out, with a warning.

    Raises:
        BadSample: no prompt could be scored.
    """
    repeats = job.config.evaluation.samples_per_prompt
    prompts = [prompt for prompt in job.eval_prompts for _ in range(repeats)]
    job.progress.phase(f"Evaluating version {job.version} on {len(job.eval_prompts)} held-out prompts")
    rollouts = await sample(job.config, prompts, job.pool, purpose="evaluation", progress=job.progress)
    job.progress.waiting("scores of held-out responses")
    measured = await _measure_all(job, prompts, rollouts)
    job.progress.waiting("")
    groups = [measured[start : start + repeats] for start in range(0, len(measured), repeats)]
    kept = [index for index, group in enumerate(groups) if not any(isinstance(row, BadSample) for row in group)]
    if bad := [row for row in measured if isinstance(row, BadSample)]:
        if not kept:
            raise bad[0]
        job.progress.warn(f"{len(groups) - len(kept)} held-out prompts are left out, not scored; the first: {bad[0]}")
    scores = [[row for row in groups[index] if not isinstance(row, BadSample)] for index in kept]
    values = means(scores)
    roles = {"reward": "proxy", "kl_to_reference": "kl", "response_tokens": "length"}
    components = [handle.config for handle in job.rewards.handles]
    roles |= {f"reward/{each.name}": "proxy" if each.weight else "held_out" for each in components}
    roles |= {f"gold/{handle.config.name}": "gold" for handle in job.judges.handles}
    return Evaluation(
        version=job.version,
        prompt_ids=[job.eval_prompts[index].prompt_id for index in kept],
        prompts=[job.eval_prompts[index].text for index in kept],
        responses=[rollouts[index * repeats].response_text for index in kept],
        scores=[group[0] for group in scores],
        roles={name: roles.get(name, "other") for name in values},
        values=values,
    )


def means(scores: Sequence[Sequence[dict[str, float]]]) -> dict[str, list[float]]:
    """Of each prompt's responses, for what all of them have: a reward model that is rolled out meanwhile may tell more,
    or less, than the one before it."""
    rows = [row for group in scores for row in group]
    names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: [float(np.mean([row[name] for row in group])) for group in scores] for name in names}


async def _measure_all(
    job: Evaluated, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
) -> list[dict[str, float] | BadSample]:
    responses = list(zip(prompts, rollouts, strict=True))
    if not job.config.deterministic:
        return list(await asyncio.gather(*(_measure(job, *pair) for pair in responses)))
    scoring, reference_size = job.config.reward_workers.max_batch_size, job.config.reference_workers.max_batch_size
    rewards, golds, references = await asyncio.gather(
        score_together(job.rewards, responses, batch_size=scoring),
        score_together(job.judges, responses, batch_size=scoring),
        reference_together(job.reference, rollouts, batch_size=reference_size),
    )
    return [_values(*each) for each in zip(rollouts, rewards, golds, references, strict=True)]


async def _measure(job: Evaluated, prompt: Prompt, rollout: Rollout) -> dict[str, float] | BadSample:
    try:
        reward, gold, reference = await asyncio.gather(
            job.rewards.score(prompt, rollout.response_text),
            job.judges.score(prompt, rollout.response_text),
            job.reference.logprobs(rollout.prompt_tokens, rollout.response_tokens),
        )
    except BadSample as bad:
        return bad
    return _values(rollout, reward, gold, reference)


def _values(
    rollout: Rollout, reward: Reward | BadSample, gold: Reward | BadSample, reference: list[float]
) -> dict[str, float] | BadSample:
    if isinstance(reward, BadSample):
        return reward
    if isinstance(gold, BadSample):
        return gold
    total, components, _ = reward
    scores = {"reward": total} if sum("/" not in name for name in components) > 1 else {}
    scores |= {f"reward/{name}": score for name, score in components.items()}
    scores |= {f"gold/{name}": score for name, score in gold[1].items()}
    return scores | {
        "kl_to_reference": sum(rollout.behavior_logprobs) - sum(reference),
        "response_tokens": float(len(rollout.response_tokens)),
        "truncated_fraction": float(rollout.finish_reason == "length"),
    }


def compare(before: Evaluation, after: Evaluation, *, shown_samples: int) -> dict[str, Any]:
    """evaluation.json: each metric before, after and the paired difference, with 95 % intervals over prompts.

    Only prompts that were scored both times count, and only metrics that there were both times: a new reward model may
    tell more, or less, than the one before it.
    """
    before, after = _only(before, after.prompt_ids), _only(after, before.prompt_ids)
    metrics = [
        {
            "name": name,
            "role": role,
            "before": mean_interval(before.values[name]).record(),
            "after": mean_interval(after.values[name]).record(),
            "difference": paired_difference(before.values[name], after.values[name]).record(),
        }
        for name, role in after.roles.items()
        if name in before.values
    ]
    samples = [
        {
            "prompt_id": before.prompt_ids[row],
            "prompt": before.prompts[row],
            "before": before.responses[row],
            "after": after.responses[row],
            "scores_before": _shown(before.scores[row]),
            "scores_after": _shown(after.scores[row]),
        }
        for row in range(min(shown_samples, len(before.prompts)))
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "num_prompts": len(after.prompts),
        "weights_version_before": before.version,
        "weights_version_after": after.version,
        "metrics": metrics,
        "samples": samples,
    }


def _only(evaluation: Evaluation, prompt_ids: Sequence[str]) -> Evaluation:
    wanted = set(prompt_ids)
    kept = [index for index, prompt_id in enumerate(evaluation.prompt_ids) if prompt_id in wanted]
    if len(kept) == len(evaluation.prompt_ids):
        return evaluation
    return replace(
        evaluation,
        prompt_ids=[evaluation.prompt_ids[index] for index in kept],
        prompts=[evaluation.prompts[index] for index in kept],
        responses=[evaluation.responses[index] for index in kept],
        scores=[evaluation.scores[index] for index in kept],
        values={name: [values[index] for index in kept] for name, values in evaluation.values.items()},
    )


def intervals(evaluation: Evaluation) -> dict[str, Interval]:
    """Mean and 95 % interval of each metric of one evaluation."""
    return {name: mean_interval(values) for name, values in evaluation.values.items()}


def record(evaluation: Evaluation) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION} | asdict(evaluation)


def from_record(data: dict[str, Any]) -> Evaluation:
    return Evaluation(**{name: data[name] for name in Evaluation.__dataclass_fields__})


def _shown(scores: dict[str, float]) -> dict[str, float]:
    names: Sequence[str] = [name for name in scores if name.startswith(("reward", "gold"))]
    return {name: scores[name] for name in names}
