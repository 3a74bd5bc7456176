"""The card beside a reward model's weights: what it was trained on, and what it must be read with.

A reward model that reads other tokens, or the same ones in another template, gives scores that mean nothing and look
right. So a folder with a card is loaded only with the tokenizer and chat template that the card names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CARD = "reward_card.json"
SCHEMA_VERSION = 2


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a reward model, None where the folder has none.

    Raises:
        ValueError: it is no JSON object of this schema version.
    """
    file = folder / CARD
    if not file.is_file():
        return None
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({' '.join(str(error).split())})") from error
    version = card.get("schema_version") if isinstance(card, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{file}: has schema version {version}, this Headrace reads {SCHEMA_VERSION}; train the reward model again"
        )
    return dict(card)


def check_card(card: dict[str, Any], tokenizer: Any, *, name: str) -> None:
    """Compare the tokenizer and template of a folder with what its card says that it was trained with.

    Raises:
        ValueError: they differ, and the scores would mean nothing.
    """
    for what, found in (("tokenizer", tokenizer_sha256(tokenizer)), ("template", template_sha256(tokenizer))):
        if card.get(f"{what}_sha256") != found:
            called = "chat template" if what == "template" else what
            raise ValueError(
                f"{name}: its {called} is not the one that it was trained with ({CARD} says "
                f"{str(card.get(f'{what}_sha256'))[:12]}, the folder has {found[:12]}); put the original back"
            )


def tokenizer_sha256(tokenizer: Any) -> str:
    """What decides which ids a text becomes: vocabulary, merges, normalisation, special tokens. Not the file's
    layout, nor the padding and truncation that a caller has set."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        del rules["padding"], rules["truncation"]
    else:
        rules = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    return sha256([json.dumps(rules, sort_keys=True).encode()])


def template_sha256(tokenizer: Any) -> str:
    return sha256([str(tokenizer.chat_template).encode()])


def files_sha256(files: Iterable[Path]) -> str:
    """Of the contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
