"""Prompt and responses out of whatever a row holds: texts, conversations, or dialogues of Human: and Assistant: turns.

A dialogue becomes prompt text so: with user turns only, their text, joined by a blank line; with others, every turn
as "Human: ...", "Assistant: ..." or "System: ...", joined by a blank line. `prompt_turns` makes it turns again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from contracts.config import ConfigError

_LABELS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_RENDERED_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System): ")

Turns = list[tuple[str, str]]  # role, text


def texts_of(row: Mapping[str, Any], where: str) -> tuple[str, str, str, str]:
    """prompt, chosen, rejected and "", or "", "", "" and why there are none."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            texts = [text_of(row[name], name, where) for name in ("prompt", "chosen", "rejected")]
            return texts[0], texts[1], texts[2], ""
        if prompt is None:
            chosen, rejected = _dialogue(chosen, "chosen", where), _dialogue(rejected, "rejected", where)
        else:  # a conversation as prompt, completions as text
            chosen, rejected = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    shared = [] if prompt is None else _turns(prompt, "prompt", where)
    sides = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        turns = _turns(value, name, where)
        if not turns or turns[-1][0] != "assistant":
            return "", "", "", "no response"
        # some sets repeat the prompt in front of both sides
        sides.append(turns if turns[: len(shared)] == shared else shared + turns)
    if sides[0][:-1] != sides[1][:-1]:
        return "", "", "", "different prompts"
    return prompt_text(sides[0][:-1]), sides[0][-1][1], sides[1][-1][1], ""


def _dialogue(text: str, name: str, where: str) -> list[dict[str, str]]:
    before, *parts = _TURN.split(text)
    if not parts or before.strip():
        raise ConfigError(
            f"{where}: no 'prompt', and {name!r} is not a dialogue of Human: and Assistant: turns: {text!r:.60}"
        )
    return [
        {"role": _ROLES[label], "content": content.strip()}
        for label, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _turns(value: Any, name: str, where: str) -> Turns:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ConfigError(f"{where}: {name!r} is neither text nor a list of messages like the others: {value!r:.60}")
    turns = []
    for message in value:
        role = message.get("role")
        if role not in _LABELS:
            raise ConfigError(f"{where}: a message of {name!r} has role {role!r}, allowed are {', '.join(_LABELS)}")
        turns.append((role, text_of(message.get("content"), f"content of {name}", where)))
    return turns


def prompt_text(turns: Turns) -> str:
    if all(role == "user" for role, _ in turns):
        return "\n\n".join(text for _, text in turns)
    return "\n\n".join(f"{_LABELS[role]}: {text}" for role, text in turns)


def text_of(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name!r} is {value!r:.60}, allowed is text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {name!r} holds half a surrogate pair, which is no text") from error
    return value


def prompt_turns(text: str) -> Turns:
    """The turns that `prompt_text` makes this text of; one of the user where it is no dialogue."""
    before, *parts = _RENDERED_TURN.split(text)
    roles = {label: role for role, label in _LABELS.items()}
    turns = [(roles[label], content) for label, content in zip(parts[::2], parts[1::2], strict=True)]
    return turns if not before and prompt_text(turns) == text else [("user", text)]
