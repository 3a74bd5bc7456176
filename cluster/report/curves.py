"""The metrics of a run as small plots: SVG that is part of the page and follows its dark or light theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cluster.report.run_files import Row, value
from cluster.report.sentences import number


@dataclass(frozen=True)
class Plot:
    """One small plot: a legend label and a metrics key for each line."""

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]
    from_zero: bool = True
    over: str = "step"  # the key of what it is drawn over; points where it is not the step


PLOTS = (
    Plot("KL to reference", "How far the policy has moved from the model it started as.",
         (("KL", "kl_to_reference"),)),
    Plot("Entropy", "How varied the sampling is; a fall to 0 is collapse.", (("entropy", "entropy"),)),
    Plot("Policy loss", "", (("policy loss", "policy_loss"),), from_zero=False),
    Plot("Value loss", "", (("value loss", "value_loss"),)),
    Plot("Clip fraction", "Share of tokens whose update was clipped.", (("clipped", "clip_fraction"),)),
    Plot("Explained variance", "How much of the return the critic foresees; 1 is all of it.",
         (("explained", "explained_variance"),), from_zero=False),
    Plot("Response length", "Tokens, mean of a batch.", (("tokens", "response_tokens_mean"),)),
    Plot("Truncated responses", "Share cut at the length limit.", (("truncated", "truncated_fraction"),)),
    Plot("Staleness", "Largest lag of a response in the batch, in steps.", (("lag", "lag_steps_max"),)),
    Plot("Busy and idle", "Share of a step.",
         (("learner busy", "learner_busy_fraction"), ("rollout idle", "rollout_idle_fraction"))),
    Plot("Step time", "Seconds; paused is generation held for new weights.",
         (("step", "step_s"), ("paused", "generation_paused_s"))),
    Plot("Throughput", "Trained samples per second.", (("samples/s", "samples_per_s"),)),
    Plot("Broadcast size", "Bytes sent for new weights, in percent of a dense copy.",
         (("percent of dense", "broadcast_percent"),)),
)  # fmt: skip
WATCHED = re.compile(r"watch/\w+_drift")
HIDDEN = {"watch/alarms", "step", "weights_version", "broadcast_bytes_dense", "schema_version"}
MAX_POINTS = 600
LINE_STYLES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 3)))
MARKERS = ("o", "^", "s", "D", "v", "P")
# Colours that matplotlib draws and the page replaces, so that plots follow the dark or light theme.
INK, GRID = "#010101", "#010102"
SERIES = tuple(f"#0202{i:02x}" for i in range(len(LINE_STYLES)))
STYLE: Any = {  # Any: matplotlib types its keys as a literal of hundreds of names
    "svg.fonttype": "none", "svg.hashsalt": "headrace", "font.size": 9, "text.parse_math": False,
    "text.color": INK, "axes.edgecolor": GRID, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": GRID, "grid.linewidth": 0.6, "axes.unicode_minus": True,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A drawn plot, as the template shows it."""

    title: str
    note: str
    svg: Markup
    legend: list[tuple[int, str, float, float]]  # series, label, first and last value


def curves(rows: Sequence[Row], *, held_out: Sequence[str] = ()) -> tuple[list[Curve], list[Curve]]:
    """The plots everybody wants, and one for every other numeric key. `held_out`: components of weight 0."""
    keys = sorted({key for row in rows for key in row})
    components = tuple((key.removeprefix("reward/"), key) for key in keys if key.startswith("reward/"))
    total: tuple[tuple[str, str], ...] = (("weighted sum", "reward_mean"),)
    if len(components) == 1 and all(row.get("reward_mean") == row.get(components[0][1]) for row in rows):
        total = ()  # one component of weight 1: the same line twice says nothing
    rewards = Plot("Reward", "Mean of a batch of training prompts, and its components before weighting.",
                   (*total, *components), from_zero=False)  # fmt: skip
    logprobs = tuple((key, key) for key in keys if "logprob" in key)
    difference = Plot("Engine against learner", "Difference of their log-probabilities for the same tokens.", logprobs)
    asked = (("trained on", "reward_mean"), *((name, f"reward/{name}") for name in held_out)) if held_out else ()
    over_kl = Plot("Reward over KL", "What is trained on and held-out rewards, each in its own units, against how far "
                   "the policy has moved. Where only the first still rises, it is being exploited.", asked,
                   from_zero=False, over="kl_to_reference")  # fmt: skip
    drifts = tuple((key[len("watch/") : -len("_drift")], key) for key in keys if WATCHED.fullmatch(key))
    drift = Plot("Watch", "Drift from the first steps, in standard deviations of single responses.", drifts,
                 from_zero=False)  # fmt: skip
    main = (rewards, over_kl, drift, *PLOTS, difference)
    shown = HIDDEN | {"reward_mean"} | {key for plot in main for _, key in plot.lines}
    others = [Plot(key, "", ((key, key),), from_zero=False) for key in keys if key not in shown]
    derived = [{**row, "broadcast_percent": _broadcast_percent(row)} for row in rows]
    return _draw_all(main, derived, "plot"), _draw_all(others, derived, "other")


def _broadcast_percent(row: Row) -> float:
    dense = value(row, "broadcast_bytes_dense")
    return 100 * value(row, "broadcast_bytes") / dense if dense > 0 else math.nan


def _draw_all(plots: Iterable[Plot], rows: Sequence[Row], prefix: str) -> list[Curve]:
    drawn = (_draw(plot, rows, f"{prefix}{index}") for index, plot in enumerate(plots))
    return [curve for curve in drawn if curve]


def _draw(plot: Plot, rows: Sequence[Row], name: str) -> Curve | None:
    legend: list[tuple[int, str, float, float]] = []
    alt, drawn = [], []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3, 2.2), layout="constrained")
        axes = figure.add_subplot()
        over_steps = plot.over == "step"
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=over_steps))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("step" if over_steps else "KL to reference, nats a response")
        for label, key in plot.lines:
            points = [(value(row, plot.over), value(row, key)) for row in rows if math.isfinite(value(row, key))]
            points = [point for point in points if math.isfinite(point[0])]
            if not points:
                continue
            series = len(legend) % len(SERIES)
            steps, values = zip(*_thin(points), strict=True)
            axes.plot(steps, values, color=SERIES[series], linestyle=LINE_STYLES[series] if over_steps else "none",
                      linewidth=1.6, marker="" if over_steps and len(points) > 2 else MARKERS[series],
                      markersize=5)  # fmt: skip
            legend.append((series, label, points[0][1], points[-1][1]))
            every = [y for _, y in points]
            drawn.append(every)
            alt.append(f"{label} from {number(every[0])} to {number(every[-1])}, lowest {number(min(every))}, "
                       f"highest {number(max(every))}")  # fmt: skip
        if not legend:
            return None
        axes.margins(y=0.08)
        lowest, highest = min(map(min, drawn)), max(map(max, drawn))
        if plot.from_zero and lowest >= 0:
            axes.set_ylim(0, 1.08 * highest or 1)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return Curve(plot.title, plot.note, inline_svg(text.getvalue(), name, f"{plot.title}: {'; '.join(alt)}."), legend)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of them: the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        point
        for stretch in stretches
        for point in sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    ]


def inline_svg(svg: str, name: str, alt: str) -> Markup:
    """Matplotlib's file as a part of the page: theme colours, page fonts, ids of its own, a text for who cannot see."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    for index, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{index})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))
