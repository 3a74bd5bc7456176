"""What an evaluation's numbers say in words, on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cluster.report.run_files import Evaluation, Metric


def number(value: float, *, width: float | None = None, sign: bool = False) -> str:
    """For people: two digits of the interval's half-width where one is given, else three digits of the value."""
    if not math.isfinite(value):
        return "unbounded"
    plus = "+" if sign else ""
    size = width or abs(value)
    if size and not 1e-4 <= size < 1e9:
        return f"{value:{plus}.2e}"
    decimals = (1 if width else 2) - math.floor(math.log10(size)) if size else 0
    if not width and value == int(value):
        decimals = 0
    decimals = min(max(decimals, 0), 6)
    return f"{round(value, decimals) + 0.0:{plus},.{decimals}f}"  # + 0.0: never "-0.00"


def decided_by(metric: Metric) -> float | None:
    """Half-width of the difference's interval, which decides the digits shown; None where it is 0 or infinite."""
    half = (metric.difference.high - metric.difference.low) / 2
    return half if math.isfinite(half) and half > 0 else None


def verdict(metric: Metric) -> str:
    if not math.isfinite(metric.difference.high - metric.difference.low):
        return "too few prompts to tell"
    return {1: "rose", -1: "fell", 0: "no clear change"}[metric.difference.direction]


def sentence(metric: Metric) -> str:
    """For example: gold rose 0.28 → 0.47 (difference +0.19, 95 % interval 0.12 to 0.26, 64 prompts)."""
    width, difference = decided_by(metric), metric.difference
    role = metric.role.replace("_", "-")
    what = f"{role} {metric.name}" if metric.role in ("proxy", "held_out", "gold") else metric.name
    low, high = number(difference.low, width=width), number(difference.high, width=width)
    return (
        f"{what}: {verdict(metric)}, {number(metric.before.mean, width=width)} → "
        f"{number(metric.after.mean, width=width)} (difference {number(difference.mean, width=width, sign=True)}, "
        f"95 % interval {low} to {high}, {difference.n} prompts)"
    )


def _outcome(metrics: Sequence[Metric], noun: str) -> str:
    rose = sum(metric.difference.direction > 0 for metric in metrics)
    fell = sum(metric.difference.direction < 0 for metric in metrics)
    if len(metrics) == 1:
        if fell:
            return f"the {noun} reward fell by more than its confidence interval"
        return f"the {noun} reward {'rose' if rose else 'did not rise'} by more than its confidence interval"
    also = f" and {fell} fell by more than theirs" if fell else ""
    return f"{rose} of {len(metrics)} {noun} rewards rose by more than their confidence intervals{also}"


def headline(evaluation: Evaluation | None) -> str:
    """The one thing to know about a run, also where it is bad news."""
    if evaluation is None:
        return "Whether the policy got better is not known: there is no held-out evaluation."
    proxy, gold = evaluation.of("proxy"), evaluation.of("gold")
    parts = [_outcome(proxy, "proxy") if proxy else "no proxy reward was measured"]
    parts.append(_outcome(gold, "gold") if gold else "no gold judge was asked, so better by the proxy is all it says")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def warning(evaluation: Evaluation | None) -> str:
    """Goodhart's law, said where it shows."""
    if evaluation is None:
        return ""
    proxy_rose = any(metric.difference.direction > 0 for metric in evaluation.of("proxy"))
    if proxy_rose and any(metric.difference.direction < 0 for metric in evaluation.of("gold")):
        return "The proxy went up while gold went down: the policy exploits the reward model (over-optimisation)."
    if proxy_rose and any(metric.difference.direction < 0 for metric in evaluation.of("held_out")):
        return "The reward went up while a held-out reward went down: the policy exploits what only the one rewards."
    if not evaluation.of("gold"):
        return ""
    if proxy_rose and not any(metric.difference.direction > 0 for metric in evaluation.of("gold")):
        return "The proxy went up without gold: the gain may be the reward model's own error."
    return ""


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """Before and after, for the terminal. Raises pydantic's ValidationError (a ValueError) on another schema."""
    parsed = Evaluation.model_validate(evaluation)
    table = Table(
        title=f"{parsed.num_prompts} held-out prompts, weights {parsed.weights_version_before} → "
        f"{parsed.weights_version_after}"
    )
    table.add_column("metric", overflow="fold")
    for name in ("before", "after", "difference"):
        table.add_column(name, justify="right")
    table.add_column("95 % interval")
    table.add_column("verdict")
    for metric in parsed.metrics:
        width, difference = decided_by(metric), metric.difference
        name = metric.name if metric.role == "other" else f"{metric.name} ({metric.role})"
        cells = (
            name,
            number(metric.before.mean, width=width),
            number(metric.after.mean, width=width),
            number(difference.mean, width=width, sign=True),
            f"{number(difference.low, width=width)} to {number(difference.high, width=width)}",
            verdict(metric),
        )
        table.add_row(*map(Text, cells))  # Text: a name with [brackets] is no markup
    return table
