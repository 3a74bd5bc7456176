"""Untrained reward models over the tiny Llama, with a card: as quick to make as their seeds are different."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from learner.reward_model.network import initial_model
from models.reward_card import CARD, SCHEMA_VERSION, template_sha256, tokenizer_sha256


def build_tiny_reward_model(folder: Path, base: Path, *, seed: int, heads: tuple[str, ...] = ("reward",)) -> Path:
    """Save `base` as a classifier whose head the seed draws, and return the folder."""
    model = initial_model(str(base), name="tiny", seed=seed, labels=heads)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    card = {
        "schema_version": SCHEMA_VERSION,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "template_sha256": template_sha256(tokenizer),
        "heads": list(heads),
        "members": 1,
    }
    (folder / CARD).write_text(json.dumps(card), encoding="utf-8")
    return folder
