"""Prompts: read from files, split by content, rendered to tokens once, and served in a seeded, resumable order."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import TemplateError

from contracts.config import ConfigError
from contracts.records import Prompt

ROLES = ("system", "user", "assistant")
_OWN_COLUMNS = ("prompt", "messages", "id", "domain")


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt file, before the chat template. `source` is its `FILE:LINE`."""

    prompt_id: str
    messages: list[dict[str, str]]
    source: str
    domain: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the user asked last."""
        return self.messages[-1]["content"]


class ChatTokenizer(Protocol):
    """What `render` needs of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


def read_rows(path: Path | str) -> list[PromptRow]:
    """Read JSONL (.jsonl, .json, .jsonl.gz) or Parquet (.parquet) prompts, in file order.

    A row without `id` gets a hash of its messages; its repetitions get `-2`, `-3` and so on, in file order.

    Raises:
        ConfigError: `FILE:LINE: what is wrong` (Parquet: the row, from 1), or `FILE: ...` for the whole file.
    """
    path = Path(path)
    rows: list[PromptRow] = []
    source_of: dict[str, str] = {}
    repeated: dict[str, int] = {}
    for number, record in _records(path):
        row = _prompt_row(record, f"{path}:{number}", repeated)
        if row.prompt_id in source_of:
            raise ConfigError(f"{row.source}: id {row.prompt_id!r} is already used at {source_of[row.prompt_id]}")
        source_of[row.prompt_id] = row.source
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path}: holds no prompts")
    return rows


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_lines,
        ".jsonl.gz": _json_lines,
        ".json.gz": _json_lines,
        ".parquet": _parquet_rows,
    }
    suffix = next((suffix for suffix in readers if path.name.endswith(suffix)), None)
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name one prompt file (.jsonl, .jsonl.gz or .parquet)")
    if suffix is None:
        raise ConfigError(f"{path}: prompts are read from .jsonl, .jsonl.gz and .parquet files")
    try:
        yield from readers[suffix](path)
    except (gzip.BadGzipFile, zlib.error, EOFError, pa.ArrowException) as error:  # before OSError: BadGzipFile is one
        raise ConfigError(f"{path}: damaged, or not what its name says: {_one_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or _one_line(error)}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}:{number}: not UTF-8 text (byte {error.start + 1} of the line)") from error
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{number}: not valid JSON: {_one_line(error)}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as data, pq.ParquetFile(data) as file:
        number = 0
        for batch in file.iter_batches():
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield number, batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{path}:{number}: not UTF-8 text") from error


def _prompt_row(record: Any, source: str, repeated: dict[str, int]) -> PromptRow:
    if not isinstance(record, dict):
        raise ConfigError(f"{source}: a row is an object with `prompt` or `messages`, this is a {_kind(record)}")
    messages = _messages(record, source)
    given_id = record.get("id")
    if given_id is None:
        prompt_id = _content_id(messages)
        repeated[prompt_id] = repeated.get(prompt_id, 0) + 1
        if repeated[prompt_id] > 1:
            prompt_id += f"-{repeated[prompt_id]}"
    elif isinstance(given_id, bool) or not isinstance(given_id, str | int) or given_id == "":
        raise ConfigError(f"{source}: id is text or a whole number, not {_kind(given_id)}")
    else:
        prompt_id = _text(str(given_id), source, "id")
    domain = record.get("domain")
    return PromptRow(
        prompt_id=prompt_id,
        messages=messages,
        source=source,
        domain=_text("" if domain is None else domain, source, "domain"),
        columns={name: value for name, value in record.items() if name not in _OWN_COLUMNS},
    )


def _messages(record: dict[str, Any], source: str) -> list[dict[str, str]]:
    prompt, messages = record.get("prompt"), record.get("messages")
    if (prompt is None) == (messages is None):
        given = "neither" if prompt is None else "both"
        raise ConfigError(f"{source}: give `prompt` (text) or `messages` (a list); this row has {given}")
    if prompt is not None:
        messages = [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{source}: messages is a list of {{role, content}}, not {_kind(messages)}")
    checked = []
    for index, message in enumerate(messages):
        where = "prompt" if prompt is not None else f"messages[{index}].content"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ConfigError(f"{source}: messages[{index}] needs a role, one of {', '.join(ROLES)}, and content")
        checked.append({"role": message["role"], "content": _text(message.get("content"), source, where)})
    if checked[-1]["role"] != "user":
        raise ConfigError(f"{source}: the last message is from {checked[-1]['role']}; it has to be from user")
    if not checked[-1]["content"].strip():
        raise ConfigError(f"{source}: the {'prompt' if prompt is not None else 'last message'} is empty")
    return checked


def _text(value: Any, source: str, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{source}: {name} is text, not {_kind(value)}")
    try:
        value.encode("utf-8")  # JSON can hold half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ConfigError(f"{source}: {name} holds half of a surrogate pair (\\ud800 to \\udfff)") from error
    return value


def _kind(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "nothing" if value is None else f"empty {type(value).__name__}"
    return type(value).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _content_id(messages: list[dict[str, str]]) -> str:
    return _digest([json.dumps(messages, ensure_ascii=False, sort_keys=True)])[:16]


def _digest(texts: Iterable[str]) -> str:
    """A hash that does not depend on the process (Python's own `hash` does)."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def split(
    rows: Sequence[PromptRow], *, eval_rows: Sequence[PromptRow] | None = None, eval_count: int, seed: int
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Divide rows into (train, held out) so that no user text, letter case and spaces aside, is on both sides.

    Without `eval_rows`, exactly `eval_count` distinct texts are held out. With them (a file of its own), at most
    `eval_count` of its texts are used, and none of its texts is trained on. Which texts are held out depends on
    the seed and the text alone, so a reordered file gives the same split. Both sides keep the order of the file.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    candidates = rows if eval_rows is None else eval_rows
    row_of_text: dict[str, PromptRow] = {}
    for row in candidates:
        row_of_text.setdefault(_same_text(row), row)
    if eval_rows is None and eval_count >= len(row_of_text):
        raise ConfigError(
            f"prompts.eval_count {eval_count} leaves nothing to train on: prompts.path holds {len(row_of_text)} "
            "distinct prompts; lower it, add prompts or give prompts.eval_path"
        )
    by_lot = sorted(row_of_text, key=lambda text: _digest([str(seed), text]))
    drawn = set(by_lot[:eval_count])
    kept_out = drawn if eval_rows is None else set(row_of_text)
    train = [row for row in rows if _same_text(row) not in kept_out]
    if not train:
        raise ConfigError("prompts.eval_path holds every prompt of prompts.path: nothing is left to train on")
    return train, [row for text, row in row_of_text.items() if text in drawn]


def _same_text(row: PromptRow) -> str:
    return " ".join(row.text.casefold().split())


def render(
    rows: Sequence[PromptRow], tokenizer: ChatTokenizer, *, system: str | None, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """Turn rows into prompts with token ids, and count those skipped for being longer than `max_prompt_tokens`.

    The chat template tokenises, once; nothing is decoded and encoded again. `system` goes in front of rows that
    bring no system message of their own, and into the tokens only.

    Raises:
        ConfigError: every prompt is too long, or the template refuses a row.
    """
    prompts: list[Prompt] = []
    shortest = None
    for row in rows:
        tokens = _tokens(row, tokenizer, system)
        shortest = len(tokens) if shortest is None else min(shortest, len(tokens))
        if len(tokens) <= max_prompt_tokens:
            prompts.append(Prompt(row.prompt_id, tokens, row.text, row.messages, row.domain, row.columns))
    if rows and not prompts:
        raise ConfigError(
            f"prompts: all {len(rows)} are longer than {max_prompt_tokens} tokens (the shortest has {shortest}); "
            "raise model.max_context_tokens or prompts.max_prompt_tokens, or lower sampling.max_response_tokens"
        )
    return prompts, len(rows) - len(prompts)


def _tokens(row: PromptRow, tokenizer: ChatTokenizer, system: str | None) -> list[int]:
    messages = row.messages
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    try:
        # return_dict differs between versions of transformers; plain ids are what is wanted.
        ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    except (TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
        raise ConfigError(f"{row.source}: the model's chat template refuses it: {_one_line(error)}") from error
    return [int(token) for token in ids]


class PromptStream:
    """Prompts without end: each epoch a fresh permutation, drawn from the seed and the epoch's number only."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt")
        self._prompts = list(prompts)
        self._seed = seed
        self._digest = _digest(
            json.dumps([prompt.prompt_id, prompt.messages], ensure_ascii=False) for prompt in prompts
        )
        self._epoch, self._position = 0, 0
        self._order = self._permutation(0)

    def next(self) -> Prompt:
        if self._position == len(self._prompts):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._permutation(self._epoch)
        prompt = self._prompts[self._order[self._position]]
        self._position += 1
        return prompt

    def by_id(self, prompt_ids: Collection[str]) -> dict[str, Prompt]:
        return {prompt.prompt_id: prompt for prompt in self._prompts if prompt.prompt_id in prompt_ids}

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for JSON; the prompts are in it as a hash of their ids and messages."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position, "prompts": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        Raises:
            ValueError: the state is of other prompts, another order of them, or another seed.
        """
        if state["prompts"] != self._digest:
            raise ValueError("the prompts are not those of the checkpoint: the prompt file, or its order, has changed")
        if state["seed"] != self._seed:
            raise ValueError(f"the checkpoint's prompt order has seed {state['seed']}, this run has {self._seed}")
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= len(self._prompts):
            raise ValueError(f"the checkpoint is at prompt {position} of {len(self._prompts)} in epoch {epoch}")
        self._epoch, self._position = epoch, position
        self._order = self._permutation(epoch)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
