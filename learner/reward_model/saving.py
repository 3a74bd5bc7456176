"""A trained reward model on disk: bf16 weights, normalisation, temperature, typical features, tokenizer, card.

N examples, B of them in a micro-batch, H hidden size, L rows of the score head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contracts.reward_model import RewardModelConfig
from learner.reward_model.batches import label_features, micro_batches, pair_features
from learner.reward_model.calibration import fit_temperature
from learner.reward_model.examples import Example, TokenLabel, TokenPair
from learner.reward_model.heads import Heads
from learner.reward_model.network import adapter_kinds, round_to_bfloat16, take_adapters
from models.adapters import save_adapter
from models.latent import LEAST_ROWS, TypicalFeatures
from models.reward import head_scores, quiet_transformers
from models.reward_card import CARD, SCHEMA_VERSION, template_sha256, tokenizer_sha256

# Of the training set: their scores give score_mean and score_std, their features what is typical. One more forward pass
# over so few is little beside a training on enough of them.
FROZEN_EXAMPLES = 128
Hidden = list[tuple[list[int], Tensor]]  # micro-batches of one kind: their places, and features


@torch.no_grad()
def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    config: RewardModelConfig,
    heads: Heads,
    base: str,
    trained_on: Sequence[Example],
    calibrated_on: Mapping[str, Sequence[Example]],
) -> None:
    """Write what transformers loads as a sequence classifier, and with LoRA adapter/ that PEFT loads over `base`.

    Normalisation, temperatures and typical features (models/latent.py; with very few examples none are written) are
    those of the rounded weights, the ones that will score.

    Raises:
        ValueError: a score that is not finite.
    """
    if config.lora is not None:
        adapter = take_adapters(model)
        kinds = adapter_kinds(model, config.lora)
        save_adapter(folder / "adapter", adapter, config.lora, kinds, base=base, classifier=True)
    round_to_bfloat16(model)
    model.score.float()  # exact, and what scoring uses
    hidden = features(model, trained_on[:: max(1, len(trained_on) // FROZEN_EXAMPLES)][:FROZEN_EXAMPLES])
    means_L, stds_H = normalisation(torch.cat([head_scores(model, each) for _, each in hidden]).cpu(), heads)
    typical = typical_features(hidden)
    temperatures = [temperature(model, calibrated_on[name], heads, name) for name in heads.names]
    model.score.bfloat16()
    model.register_buffer("score_mean", means_L)
    model.register_buffer("score_std", stds_H)
    model.register_buffer("temperature", torch.tensor(temperatures))
    model.config.pad_token_id = tokenizer.pad_token_id
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if typical is not None:
        typical.save(folder)


def normalisation(scores_NL: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Means [L] of raw scores, and deviations [heads] of the members' mean.

    Raises:
        ValueError: a score that is not finite.
    """
    if not torch.isfinite(scores_NL).all():
        bad = int((~torch.isfinite(scores_NL)).any(1).sum())
        raise ValueError(f"{bad} of {len(scores_NL)} training scores are not finite: the reward model cannot be used")
    by_head_NH = torch.stack([scores_NL[:, heads.columns(name)].mean(1) for name in heads.names], dim=1)
    return scores_NL.mean(0), by_head_NH.std(0).clamp(min=1e-6)  # equal scores must not divide by 0


def typical_features(hidden: Hidden) -> TypicalFeatures | None:
    """Of both answers of a pair; None of too few."""
    groups = [place for places, hidden_BH in hidden for place in places * (len(hidden_BH) // len(places))]
    if len(groups) < LEAST_ROWS:
        return None
    features_NH = torch.cat([hidden_BH for _, hidden_BH in hidden]).double().cpu().numpy()
    return TypicalFeatures.fit(features_NH, np.array(groups))


def temperature(model: Any, examples: Sequence[Example], heads: Heads, name: str) -> float:
    """Of a head's mean raw scores; 1 where there is nothing to fit it on."""
    if not examples:
        return 1.0
    logits = [0.0] * len(examples)
    for places, hidden_BH in features(model, examples):
        mean_B = head_scores(model, hidden_BH)[:, heads.columns(name)].mean(1).tolist()
        if isinstance(examples[places[0]], TokenPair):
            half = len(places)
            mean_B = [better - worse for better, worse in zip(mean_B[:half], mean_B[half:], strict=True)]
        for place, logit in zip(places, mean_B, strict=True):
            logits[place] = logit
    return fit_temperature(logits, [example.probability for example in examples])


def features(model: Any, examples: Sequence[Example]) -> Hidden:
    """The heads' inputs by micro-batch, of pairs all chosen before all rejected."""
    found: Hidden = []
    for kind in (TokenPair, TokenLabel):
        places = [place for place, example in enumerate(examples) if isinstance(example, kind)]
        some: list[Any] = [examples[place] for place in places]
        for part in micro_batches(some):
            rows = [some[at] for at in part]
            hidden_BH = torch.cat(pair_features(model, rows)) if kind is TokenPair else label_features(model, rows)
            found.append(([places[at] for at in part], hidden_BH))
    return found


def write_card(
    folder: Path,
    tokenizer: Any,
    config: RewardModelConfig,
    *,
    heads: Heads,
    identity: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """reward_card.json: what the model is, and what it must be read with. `identity`: base, data, seed, software.

    Loading needs a card, and metrics need the loaded model: so it is written without them first.
    """
    card = {
        "schema_version": SCHEMA_VERSION,
        **identity,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "template_sha256": template_sha256(tokenizer),
        "pad_token": tokenizer.pad_token,
        "heads": list(heads.names),
        "members": heads.members,
        "loss": loss_in_words(config),
        "config": config.model_dump(mode="json"),
    }
    if metrics is not None:
        card |= {"reward_version": metrics["reward_version"], "metrics": dict(metrics)}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def loss_in_words(config: RewardModelConfig) -> str:
    """For a person who reads the card."""
    parts = ["Bradley-Terry with soft targets, cross-entropy on labels"]
    for name in ("margin", "label_smoothing", "flip_rate", "centring"):
        if value := getattr(config, name):
            parts.append(f"{name} {value:g}")
    if config.class_weights != "none":
        parts.append("balanced classes")
    return "; ".join(parts)
