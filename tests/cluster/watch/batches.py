"""Scored responses as a run logs them, drawn."""

import numpy as np

from contracts.records import Rollout, ScoredRollout


def response(tokens, group: str, components, *, reward: float, text: str = "", number: int = 0) -> ScoredRollout:
    rollout = Rollout(
        trajectory_id=f"{group}-{number}",
        prompt_id=f"prompt of {group}",
        group_id=group,
        prompt_tokens=[1],
        response_tokens=list(tokens),
        response_text=text or " ".join(map(str, tokens)),
        behavior_logprobs=[-1.0] * len(tokens),
        weights_versions=[0] * len(tokens),
        finish_reason="stop",
        actor_id="rollout-0",
    )
    return ScoredRollout(rollout, reward, dict(components), "v1", [-1.5] * len(tokens))


def batch(
    rng: np.random.Generator,
    *,
    reward: float = 0.0,
    held_out: float = 0.0,
    length: float = 40.0,
    repeated: float = 0.0,
    std: float = 0.2,
    latent: float | None = None,
    groups: int = 16,
    per_group: int = 2,
) -> list[ScoredRollout]:
    """`repeated`: chance that a token is always the same one. The held-out reward has ten times the proxy's spread."""
    samples = []
    for number in range(groups * per_group):
        count = max(4, int(rng.normal(length, 6)))
        tokens = np.where(rng.random(count) < repeated, 7, rng.integers(10, 3000, count)).tolist()
        hard = rng.normal()
        components = {
            "proxy": reward + hard + 0.3 * rng.normal(),
            "gold": held_out + 10 * (hard + 0.3 * rng.normal()),
            "proxy/std": max(0.0, std + 0.05 * rng.normal()),
        }
        if latent is not None:
            components["proxy/latent"] = max(0.0, latent + 0.2 * rng.normal())
        group = f"group-{number // per_group}"
        samples.append(response(tokens, group, components, reward=components["proxy"], number=number))
    return samples
