"""Pairs of responses that people may compare: of a file, a run, two evaluations. live_pairs.py samples new ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from actors.prompts import PromptRow, read_rows
from cluster import experience_log
from contracts import loading as configuration
from contracts.config import ConfigError
from contracts.labelling import PairSource
from contracts.records import SCHEMA_VERSION, Rollout
from feedback.formats import stream_pairs
from feedback.store import Candidate, Written


def candidates(source: PairSource, dropped: Counter[str]) -> Iterator[Candidate]:
    """The pairs of a source that is a file or a folder; what is left out is counted in `dropped` by reason.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    if source.file is not None:
        return _of_file(source.file, dropped)
    if source.run is not None:
        return _of_run(source.run, source.steps, dropped)
    if source.evaluations is not None:
        return _of_evaluations(*source.evaluations, dropped)
    raise ValueError("a live policy is sampled while people label: see LivePairs")


def _of_file(path: Path, dropped: Counter[str]) -> Iterator[Candidate]:
    for row in stream_pairs(path, dropped):
        yield Candidate(
            row.prompt, Written(row.chosen), Written(row.rejected), "file", prompt_name=row.prompt_id, domain=row.domain
        )


def _of_run(run_dir: Path, newest: int, dropped: Counter[str]) -> Iterator[Candidate]:
    """Responses of a run to the same prompt, two and two as they came: of one version, or of one and a later one."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"labelling.pairs: {run_dir} is no folder of a run: it has no config.yaml")
    steps = experience_log.steps(run_dir)[-newest:]
    if not steps:
        raise ConfigError(f"labelling.pairs: {run_dir}/experience holds no steps yet: train first")
    config = configuration.load(run_dir / "config.yaml")
    prompts = {row.prompt_id: row for row in read_rows(config.prompts.path)}
    answers: dict[str, list[Rollout]] = {}
    for step in steps:
        try:
            batch = experience_log.batch(run_dir, step)
        except ValueError as error:
            raise ConfigError(f"labelling.pairs: {error}") from error
        for scored in batch:
            answers.setdefault(scored.rollout.prompt_id, []).append(scored.rollout)
    for prompt_id, rollouts in answers.items():
        if prompt_id not in prompts:
            dropped["unknown prompt"] += len(rollouts) // 2
            continue
        written = [_written(rollout, config.sampling.temperature) for rollout in rollouts]
        for first, second in list(pairwise(written))[::2]:
            yield _candidate(prompts[prompt_id], first, second)


def _written(rollout: Rollout, temperature: float) -> Written:
    return Written(rollout.response_text, max(rollout.weights_versions, default=0), {"temperature": temperature})


def _candidate(row: PromptRow, first: Written, second: Written) -> Candidate:
    dialogue = row.messages if len(row.messages) > 1 else None
    return Candidate(
        row.text, first, second, "versions", prompt_name=row.prompt_id, domain=row.domain, messages=dialogue
    )


def _of_evaluations(one: Path, other: Path, dropped: Counter[str]) -> Iterator[Candidate]:
    first, second = _evaluation(one), _evaluation(other)
    answers = {key: (text, said) for key, text, said in _rows(second)}
    version_a, version_b = int(first["version"]), int(second["version"])
    for key, prompt, said in _rows(first):
        if answers.get(key, ("", ""))[0] != prompt:
            dropped["prompt in one evaluation alone"] += 1
            continue
        yield Candidate(
            prompt, Written(said, version_a), Written(answers[key][1], version_b), "versions", prompt_name=key
        )


def _rows(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    return zip(evaluation["prompt_ids"], evaluation["prompts"], evaluation["responses"], strict=True)


def _evaluation(path: Path) -> dict[str, Any]:
    """As `headrace eval --output` wrote it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"labelling.pairs: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"labelling.pairs: {path} is not JSON: {error}") from error
    columns = ("prompt_ids", "prompts", "responses")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in columns):
        raise ConfigError(f"labelling.pairs: {path} is no evaluation: write one with `headrace eval --output`")
    if found.get("schema_version") != SCHEMA_VERSION or type(found.get("version")) is not int:
        raise ConfigError(f"labelling.pairs: {path} is an evaluation of another Headrace: write it again")
    if len({len(found[name]) for name in columns}) != 1:
        raise ConfigError(f"labelling.pairs: {path} is damaged: not as many responses as prompts")
    return found
