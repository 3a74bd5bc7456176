"""Judged rows as tokens: which of them can be learned from, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contracts.records import Comparison
from feedback.quality import UnpairedLabel
from learner.reward_model.heads import Heads
from models.reward import render

Row = Comparison | UnpairedLabel


@dataclass(frozen=True)
class TokenPair:
    """Both rendered dialogues of a comparison, and the probability that chosen is the better one."""

    chosen: list[int]
    rejected: list[int]
    probability: float

    @property
    def shared_tokens(self) -> int:
        """Length of the common prefix."""
        shortest = min(len(self.chosen), len(self.rejected))
        return next((t for t in range(shortest) if self.chosen[t] != self.rejected[t]), shortest)

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class TokenLabel:
    """A rendered dialogue and what was said of its last message: 1 good, 0 bad."""

    tokens: list[int]
    probability: float

    @property
    def longest(self) -> int:
        return len(self.tokens)


Example = TokenPair | TokenLabel


@dataclass(frozen=True)
class Examples:
    """Rows that can be learned from, each with its tokens, and how many could not be, by reason."""

    rows: list[Row]
    tokens: list[Example]
    dropped: dict[str, int]

    def of(self, rows: Sequence[Row]) -> list[Example]:
        """The tokens of some of the rows."""
        by_identity = {id(row): tokens for row, tokens in zip(self.rows, self.tokens, strict=True)}
        return [by_identity[id(row)] for row in rows]


def examples(
    comparisons: Sequence[Comparison],
    labels: Sequence[UnpairedLabel],
    tokenizer: Any,
    *,
    heads: Heads,
    max_tokens: int,
) -> Examples:
    """Render what can be used. Dropped are rows with an `empty` side, pairs whose sides are `identical` after
    truncation, and rows of `no head`, whose domain no head learns from.

    Raises:
        ValueError: a probability that is not within 0 and 1.
    """
    dropped: Counter[str] = Counter()
    for comparison in comparisons:
        if not 0 <= comparison.probability <= 1:
            raise ValueError(
                f"comparison on {comparison.prompt!r:.60}: probability is {comparison.probability}, allowed is 0 to 1"
            )
    pairs, rendered = token_pairs(
        [c for c in comparisons if _learned(c, heads, dropped)], tokenizer, max_tokens, dropped
    )
    spoken = []
    for label in labels:
        if _learned(label, heads, dropped):
            if label.response.strip():
                spoken.append(label)
            else:
                dropped["empty"] += 1
    tokens = render(tokenizer, [dialogue(label.prompt, label.response) for label in spoken], max_tokens=max_tokens)
    single = [TokenLabel(ids, float(label.good)) for ids, label in zip(tokens, spoken, strict=True)]
    return Examples([*pairs, *spoken], [*rendered, *single], dict(dropped))


def token_pairs(
    comparisons: Sequence[Comparison], tokenizer: Any, max_tokens: int, dropped: Counter[str]
) -> tuple[list[Comparison], list[TokenPair]]:
    """The usable comparisons in order, and their tokens; the others are counted in `dropped`."""
    spoken = [c for c in comparisons if c.chosen.strip() and c.rejected.strip()]
    dropped.update({"empty": len(comparisons) - len(spoken)})
    chosen = render(tokenizer, [dialogue(c.prompt, c.chosen) for c in spoken], max_tokens=max_tokens)
    rejected = render(tokenizer, [dialogue(c.prompt, c.rejected) for c in spoken], max_tokens=max_tokens)
    usable, pairs = [], []
    for comparison, better, worse in zip(spoken, chosen, rejected, strict=True):
        if better == worse:
            dropped["identical"] += 1
        else:
            usable.append(comparison)
            pairs.append(TokenPair(better, worse, comparison.probability))
    return usable, pairs


def dialogue(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _learned(row: Row, heads: Heads, dropped: Counter[str]) -> bool:
    if heads.of_domain(row.domain):
        return True
    dropped["no head"] += 1
    return False
