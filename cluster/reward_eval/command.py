"""Runs every measurement of a reward model on a file of labelled pairs; writes report.html and evaluation.json."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.intervals import Interval
from cluster.progress import Progress
from cluster.reward_eval import linear, numbers
from cluster.reward_eval.features import frozen_features
from cluster.reward_eval.invariance import Invariance, invariance
from cluster.reward_eval.numbers import Array, Calibration, Quality, Share
from cluster.reward_eval.page import write_page
from cluster.run_log import write_json
from contracts.config import ConfigError
from contracts.records import SCHEMA_VERSION, Comparison
from feedback.formats import read_preferences
from learner.reward_model.examples import dialogue, token_pairs
from models.reward import RewardModel
from models.reward_card import read_card

MIN_PROMPTS = 2
CHUNK_PAIRS = 64  # scored between two signs of life


@dataclass(frozen=True)
class RewardEvalOptions:
    """What `headrace reward-eval` is asked for. `out` None: runs/reward-eval-VERSION."""

    model: str
    pairs: Path
    new: Path | None = None
    out: Path | None = None
    limit: int | None = None
    max_tokens: int = 1024
    head: str | None = None
    leave_one_domain_out: bool = False
    base: str | None = None
    checked_pairs: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Baseline:
    """What something simpler reaches on the same pairs, and by how much the reward model is better (accuracy)."""

    name: str
    how: str
    quality: Quality
    behind_by: Interval


@dataclass(frozen=True)
class LeftOut:
    """Heads on a frozen base, tested on one domain: trained on the others alone, and on all (other prompts)."""

    domain: str
    left_out: Share
    seen: Share
    loss_of_accuracy: Interval


@dataclass(frozen=True)
class RewardEvaluation:
    """Everything that the page shows."""

    model: str
    reward_version: str
    temperature: float
    pairs_file: str
    pairs: int
    prompts: int
    dropped: dict[str, int]
    overall: Quality
    domains: dict[str, Quality]
    calibration: Calibration
    adaptive_calibration: Calibration
    lengths: dict[str, Share]
    baselines: tuple[Baseline, ...]
    invariance: Invariance
    new_labels: Quality | None
    new_file: str
    new_known_prompts: int  # of the new file, prompts that the other one has too: left out
    left_out: tuple[LeftOut, ...]
    base: str


def evaluate_reward_model(options: RewardEvalOptions, progress: Progress) -> RewardEvaluation:
    """Measure, write DIR/report.html and DIR/evaluation.json, and say the sentence that matters.

    Raises:
        ConfigError: a file or the model cannot be read, too few prompts are left, a score is not finite, or there is
            one domain only and `leave_one_domain_out` is asked for.
    """
    rows, dropped = read_preferences(options.pairs)
    new_rows, _ = read_preferences(options.new) if options.new else ([], {})
    rows = _limited(rows, options.limit, seed=options.seed)
    if options.leave_one_domain_out and len({row.domain for row in rows}) < 2:
        raise ConfigError(
            f"{options.pairs}: --leave-one-domain-out needs a `domain` column with two domains at least, this file has "
            f"{len({row.domain for row in rows})}"
        )
    progress.phase(f"Loading {options.model}")
    model = _load(options)
    base = _base(options) if options.leave_one_domain_out else ""
    rows, dropped = _usable(model, rows, dropped, options.pairs)
    progress.phase(f"Scoring {len(rows)} pairs")
    scores_N2 = _scores(model, rows, options.pairs, progress)
    margins_N = (scores_N2[:, 0] - scores_N2[:, 1]) / model.temperature
    labels_N = np.array([row.probability for row in rows])
    prompts_N = [row.prompt.strip() for row in rows]
    progress.phase("Asking again in other company, and fitting baselines")
    lengths_N2 = _lengths(model, rows)
    evaluation = RewardEvaluation(
        model=options.model,
        reward_version=model.version,
        temperature=model.temperature,
        pairs_file=str(options.pairs),
        pairs=len(rows),
        prompts=len(set(prompts_N)),
        dropped=dropped,
        overall=numbers.quality(margins_N, labels_N, prompts_N),
        domains=numbers.by_domain(margins_N, labels_N, prompts_N, [row.domain for row in rows]),
        calibration=numbers.calibration(margins_N, labels_N, prompts_N, equal_mass=False),
        adaptive_calibration=numbers.calibration(margins_N, labels_N, prompts_N, equal_mass=True),
        lengths=numbers.by_length(margins_N, labels_N, prompts_N, lengths_N2),
        baselines=_baselines(rows, lengths_N2, margins_N, labels_N, prompts_N, seed=options.seed),
        invariance=_invariance(model, rows, scores_N2, options),
        **_new_labels(model, new_rows, set(prompts_N), options, progress),
        left_out=_left_out(rows, base, options, progress) if base else (),
        base=base,
    )
    _write(evaluation, options, progress)
    return evaluation


def _load(options: RewardEvalOptions) -> RewardModel:
    try:
        return RewardModel.load(options.model, max_tokens=options.max_tokens, head=options.head)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _base(options: RewardEvalOptions) -> str:
    """What the reward model was trained from: features of itself would know the domain that is left out."""
    card = read_card(Path(options.model)) if Path(options.model).is_dir() else None
    base = options.base or (card or {}).get("base")
    if not base:
        raise ConfigError(
            f"{options.model}: has no reward_card.json that names its base: give --base, for --leave-one-domain-out "
            "trains on features of the model that this one started from"
        )
    return str(base)


def _limited(rows: list[Comparison], limit: int | None, *, seed: int) -> list[Comparison]:
    """At most about `limit` pairs: whole prompts, drawn at random."""
    if limit is None or len(rows) <= limit:
        return rows
    prompts = sorted({row.prompt.strip() for row in rows})
    random.Random(seed).shuffle(prompts)
    place = {prompt: at for at, prompt in enumerate(prompts)}
    ordered = sorted(range(len(rows)), key=lambda at: (place[rows[at].prompt.strip()], at))
    return [rows[at] for at in sorted(ordered[:limit])]


def _usable(
    model: RewardModel, rows: list[Comparison], dropped: dict[str, int], file: Path
) -> tuple[list[Comparison], dict[str, int]]:
    cut = Counter[str]()
    usable, _ = token_pairs(rows, model.tokenizer, model.max_tokens, cut)
    reasons = dict(dropped) | {"identical after truncation": cut["identical"]}
    num_prompts = len({row.prompt.strip() for row in usable})
    if num_prompts < MIN_PROMPTS:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "none dropped"
        raise ConfigError(f"{file}: {len(usable)} usable pairs on {num_prompts} prompts ({why}); 2 prompts are needed")
    return usable, {reason: count for reason, count in reasons.items() if count}


def _sides(row: Comparison) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return dialogue(row.prompt, row.chosen), dialogue(row.prompt, row.rejected)


def _scores(model: RewardModel, rows: Sequence[Comparison], file: Path, progress: Progress) -> Array:
    """Scores [N, 2] of chosen and rejected."""
    scores_N2 = np.zeros((len(rows), 2))
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].prompt) + len(rows[at].chosen))
    for start in range(0, len(order), CHUNK_PAIRS):
        chunk = order[start : start + CHUNK_PAIRS]
        progress.waiting(f"scores: {start} of {len(rows)} pairs")
        scores_N2[chunk] = np.array(model.score([side for at in chunk for side in _sides(rows[at])])).reshape(-1, 2)
    progress.waiting("")
    bad = np.flatnonzero(~np.isfinite(scores_N2).all(axis=1))
    if bad.size:
        raise ConfigError(
            f"{file}: usable pair {bad[0] + 1} ({rows[bad[0]].prompt[:60]!r}) gets the scores "
            f"{scores_N2[bad[0]].tolist()} from this reward model: one that is not finite says nothing"
        )
    return scores_N2


def _lengths(model: RewardModel, rows: Sequence[Comparison]) -> NDArray[np.int64]:
    """Tokens [N, 2] of the two answers, whole ones: what is cut off is length too."""
    sides = [[row.chosen for row in rows], [row.rejected for row in rows]]
    counts = [[len(ids) for ids in model.tokenizer(texts, add_special_tokens=False)["input_ids"]] for texts in sides]
    return np.array(counts, dtype=np.int64).T


def _baselines(
    rows: Sequence[Comparison],
    lengths_N2: NDArray[np.int64],
    margins_N: Array,
    labels_N: Array,
    prompts_N: Sequence[str],
    *,
    seed: int,
) -> tuple[Baseline, ...]:
    length_ND = linear.length_differences(lengths_N2)
    words_ND = linear.word_differences([row.chosen for row in rows], [row.rejected for row in rows])
    fits = (
        ("length alone", "whether longer wins, and how surely, learned from the labels of other prompts here",
         linear.cross_fitted(length_ND, labels_N, prompts_N, l2s=(1e-3,), seed=seed)),
        ("bag of words", "logistic regression on TF-IDF of words and pairs of words, from other prompts here",
         linear.cross_fitted(words_ND, labels_N, prompts_N, seed=seed)),
    )  # fmt: skip
    return tuple(
        Baseline(
            name=name,
            how=how,
            quality=numbers.quality(found_N, labels_N, prompts_N),
            behind_by=numbers.better_by(margins_N, found_N, labels_N, prompts_N),
        )
        for name, how, found_N in fits
    )


def _invariance(
    model: RewardModel, rows: Sequence[Comparison], scores_N2: Array, options: RewardEvalOptions
) -> Invariance:
    asked = sorted(random.Random(options.seed).sample(range(len(rows)), min(options.checked_pairs, len(rows))))
    return invariance(model, [_sides(rows[at]) for at in asked], scores_N2[asked], temperature=model.temperature)


def _new_labels(
    model: RewardModel,
    rows: list[Comparison],
    known_prompts: set[str],
    options: RewardEvalOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Quality on labels that came later, on prompts that the other file does not have."""
    if options.new is None:
        return {"new_labels": None, "new_file": "", "new_known_prompts": 0}
    repeated = {row.prompt.strip() for row in rows} & known_prompts
    fresh = _limited([row for row in rows if row.prompt.strip() not in repeated], options.limit, seed=options.seed)
    fresh, _ = _usable(model, fresh, {"on prompts of the other file": len(repeated)}, options.new)
    progress.phase(f"Scoring {len(fresh)} pairs with new labels")
    scores_N2 = _scores(model, fresh, options.new, progress)
    margins_N = (scores_N2[:, 0] - scores_N2[:, 1]) / model.temperature
    labels_N = np.array([row.probability for row in fresh])
    found = numbers.quality(margins_N, labels_N, [row.prompt.strip() for row in fresh])
    return {"new_labels": found, "new_file": str(options.new), "new_known_prompts": len(repeated)}


def _left_out(
    rows: Sequence[Comparison], base: str, options: RewardEvalOptions, progress: Progress
) -> tuple[LeftOut, ...]:
    progress.phase("Leaving out one domain at a time")
    try:
        usable, features_N2H, _ = frozen_features(rows, base=base, max_tokens=options.max_tokens, say=progress.waiting)
    except ValueError as error:
        raise ConfigError(f"--base: {error}") from error
    progress.waiting("")
    differences_NH = (features_N2H[:, 0] - features_N2H[:, 1]).astype(np.float64)
    labels_N = np.array([row.probability for row in usable])
    prompts_N = [row.prompt.strip() for row in usable]
    seen_N = linear.cross_fitted(differences_NH, labels_N, prompts_N, seed=options.seed)
    found = []
    for domain in sorted({row.domain for row in usable}):
        here_N = np.array([row.domain == domain for row in usable])
        here = [prompt for prompt, inside in zip(prompts_N, here_N, strict=True) if inside]
        # a prompt that is in this domain too is none of the others'
        known_N = ~np.isin(np.array(prompts_N, dtype=object), here)
        if not known_N.any():
            continue
        known = [prompt for prompt, inside in zip(prompts_N, known_N, strict=True) if inside]
        weights_H = linear.fit_with_best_l2(differences_NH[known_N], labels_N[known_N], known, seed=options.seed)
        blind_N = differences_NH[here_N] @ weights_H
        found.append(
            LeftOut(
                domain=domain,
                left_out=numbers.accuracy(blind_N, labels_N[here_N], here),
                seen=numbers.accuracy(seen_N[here_N], labels_N[here_N], here),
                loss_of_accuracy=numbers.better_by(seen_N[here_N], blind_N, labels_N[here_N], here),
            )
        )
    return tuple(found)


def _write(evaluation: RewardEvaluation, options: RewardEvalOptions, progress: Progress) -> None:
    out = options.out or Path("runs") / f"reward-eval-{evaluation.reward_version}"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", {"schema_version": SCHEMA_VERSION} | record(evaluation))
    write_page(evaluation, out / "report.html")
    progress.note(f"{out / 'report.html'} and evaluation.json")


def record(value: Any) -> Any:
    """For JSON: dataclasses as objects, an unbounded or unknown number as null."""
    if isinstance(value, Interval):
        return record(value.record())
    if is_dataclass(value) and not isinstance(value, type):
        return {name: record(getattr(value, name)) for name in asdict(value)}
    if isinstance(value, dict):
        return {key: record(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [record(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
