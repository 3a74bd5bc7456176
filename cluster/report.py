"""report.html: what a run did, on one page that opens anywhere and fetches nothing.

`write_report` reads whatever the run has left in its folder. Only config.yaml is required: the report of an
interrupted run says what is missing and what therefore is not known. Numbers are shown rounded; the exact ones
are in the page too (`<data value=...>`).
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jinja2
import matplotlib
import yaml
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError
from rich.table import Table
from rich.text import Text

from cluster.intervals import Interval
from contracts.config import ConfigError

Row = Mapping[str, Any]


# ---- what the run left ----


def _interval(value: Any) -> Any:
    return (
        Interval.from_record(value)
        if isinstance(value, Mapping) and {"mean", "low", "high", "n"} <= set(value)
        else value
    )


Bounds = Annotated[Interval, BeforeValidator(_interval)]


class Metric(BaseModel):
    name: str
    role: Literal["proxy", "gold", "kl", "length", "other"]
    before: Bounds
    after: Bounds
    difference: Bounds


class Sample(BaseModel):
    prompt_id: str
    prompt: str
    before: str
    after: str
    scores_before: dict[str, FiniteFloat] = {}
    scores_after: dict[str, FiniteFloat] = {}


class Evaluation(BaseModel):
    """evaluation.json: held-out prompts before and after training."""

    schema_version: Literal[1]
    num_prompts: int
    weights_version_before: int
    weights_version_after: int
    metrics: list[Metric]
    samples: list[Sample] = []

    def of(self, role: str) -> list[Metric]:
        return [metric for metric in self.metrics if metric.role == role]


class RewardModel(BaseModel):
    held_out_accuracy: Bounds
    train_pairs: int
    held_out_pairs: int
    seconds: float
    reward_version: int | str


class Preferences(BaseModel):
    """preferences.json: where comparisons came from and how good the reward model trained on them is."""

    simulated: bool
    pairs: int
    votes: int
    dropped: dict[str, int] = {}
    voters: dict[str, FiniteFloat] = {}
    agreement_with_gold: FiniteFloat | None = None
    reward_model: RewardModel | None = None


T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class RunFolder:
    """Reads the files of a run; `missing` collects a sentence for everything that is absent or broken."""

    path: Path
    missing: list[str]

    def text(self, name: str, consequence: str = "") -> str | None:
        try:
            return (self.path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            if consequence:
                self.missing.append(f"{name} is missing: {consequence}")
            return None

    def json(self, name: str, consequence: str) -> Any:
        text = self.text(name, consequence)
        if text is None:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            self.missing.append(f"{name} is not valid JSON ({error}): {consequence}")
            return None

    def record(self, name: str, kind: type[T], consequence: str) -> T | None:
        data = self.json(name, consequence)
        if data is None:
            return None
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"])) or "its content"
            self.missing.append(f"{name} cannot be read ({field}: {problem['msg']}): {consequence}")
            return None

    def rows(self, name: str, consequence: str = "") -> list[dict[str, Any]]:
        """Objects of a JSONL file. A line that a kill has torn is left out and said."""
        rows, torn = [], 0
        for line in (self.text(name, consequence) or "").split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                torn += 1
        if torn:
            self.missing.append(f"{name}: {torn} unreadable line{'s' if torn > 1 else ''} left out")
        return rows


# ---- numbers and sentences ----


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


def _decided_by(metric: Metric) -> float | None:
    half = (metric.difference.high - metric.difference.low) / 2
    return half if math.isfinite(half) and half > 0 else None


def verdict(metric: Metric) -> str:
    if not math.isfinite(metric.difference.high - metric.difference.low):
        return "too few prompts to tell"
    return {1: "rose", -1: "fell", 0: "no clear change"}[metric.difference.direction]


def sentence(metric: Metric) -> str:
    """For example: gold rose 0.28 → 0.47 (difference +0.19, 95 % interval 0.12 to 0.26, 64 prompts)."""
    width, difference = _decided_by(metric), metric.difference
    what = f"{metric.role} {metric.name}" if metric.role in ("proxy", "gold") else metric.name
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
    if evaluation is None or not evaluation.of("gold"):
        return ""
    proxy_rose = any(metric.difference.direction > 0 for metric in evaluation.of("proxy"))
    if proxy_rose and any(metric.difference.direction < 0 for metric in evaluation.of("gold")):
        return "The proxy went up while gold went down: the policy exploits the reward model (over-optimisation)."
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
        width, difference = _decided_by(metric), metric.difference
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


# ---- curves ----


@dataclass(frozen=True)
class Plot:
    """One small plot: a legend label and a metrics key for each line."""

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]
    from_zero: bool = True


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
HIDDEN = {"step", "weights_version", "broadcast_bytes_dense", "schema_version"}
MAX_POINTS = 600
LINE_STYLES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 3)))
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


def value(row: Row, key: str) -> float:
    """NaN where the key is absent or no finite number."""
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return math.nan
    return float(found)


def curves(rows: Sequence[Row]) -> tuple[list[Curve], list[Curve]]:
    """The plots everybody wants, and one for every other numeric key."""
    keys = sorted({key for row in rows for key in row})
    components = tuple((key.removeprefix("reward/"), key) for key in keys if key.startswith("reward/"))
    total: tuple[tuple[str, str], ...] = (("weighted sum", "reward_mean"),)
    if len(components) == 1 and all(row.get("reward_mean") == row.get(components[0][1]) for row in rows):
        total = ()  # one component of weight 1: the same line twice says nothing
    rewards = Plot("Reward", "Mean of a batch of training prompts, and its components before weighting.",
                   (*total, *components), from_zero=False)  # fmt: skip
    logprobs = tuple((key, key) for key in keys if "logprob" in key)
    difference = Plot("Engine against learner", "Difference of their log-probabilities for the same tokens.", logprobs)
    main = (rewards, *PLOTS, difference)
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
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("step")
        for label, key in plot.lines:
            points = [(value(row, "step"), value(row, key)) for row in rows if math.isfinite(value(row, key))]
            if not points:
                continue
            series = len(legend) % len(SERIES)
            steps, values = zip(*_thin(points), strict=True)
            axes.plot(steps, values, color=SERIES[series], linestyle=LINE_STYLES[series], linewidth=1.6,
                      marker="o" if len(points) < 3 else "")  # fmt: skip
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
    return Curve(plot.title, plot.note, _inline(text.getvalue(), name, f"{plot.title}: {'; '.join(alt)}."), legend)


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


def _inline(svg: str, name: str, alt: str) -> Markup:
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


# ---- the page ----


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from what is there, and return its path.

    Raises:
        ConfigError: there is no readable config.yaml, so this is no run folder.
    """
    run_dir = Path(run_dir)
    page = _render(run_dir)
    path = run_dir / "report.html"
    unfinished = run_dir / f".report.html.{os.getpid()}"
    # A lone surrogate in a response is no UTF-8; the page must not fail for it.
    unfinished.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(unfinished, path)
    return path


def _render(run_dir: Path) -> str:
    folder = RunFolder(run_dir, [])
    config_text, config = _config(folder)
    rows = _steps(folder)
    steps = config.get("steps")
    last = int(rows[-1]["step"]) if rows else 0
    if isinstance(steps, int) and last < steps:
        folder.missing.append(f"The run has finished {last} of {steps} steps.")
    evaluation = folder.record("evaluation.json", Evaluation, "no comparison of before and after, no samples.")
    preferences = None
    if config.get("preferences") or (run_dir / "preferences.json").exists():
        preferences = folder.record("preferences.json", Preferences, "nothing about the votes and the reward model.")
    environment = folder.json("environment.json", "versions and machine are not known.")
    main, others = curves(rows)
    reasons = Counter(str(row.get("reason", "no reason given")) for row in folder.rows("quarantine.jsonl"))
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # not select_autoescape: it goes by the ending, and .j2 is none it knows
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    return template.render(
        name=run_dir.resolve().name, config=config, config_text=config_text, missing=folder.missing, rows=rows,
        steps=steps, facts=_facts(rows, steps), evaluation=evaluation, headline=headline(evaluation),
        warning=warning(evaluation), preferences=preferences, curves=main, other_curves=others,
        environment=environment if isinstance(environment, dict) else {}, quarantine=reasons.most_common(),
        events=folder.rows("events.jsonl"), written=datetime.now(UTC), number=number, sentence=sentence,
        verdict=verdict, decided_by=_decided_by, when=_when,
    )  # fmt: skip


def _config(folder: RunFolder) -> tuple[str, dict[str, Any]]:
    # Not contracts.config.load: a run of an older version, with other keys, still gets its report.
    text = folder.text("config.yaml")
    if text is None:
        raise ConfigError(f"{folder.path}: no config.yaml here, so this is not a run folder")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder.path / 'config.yaml'}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder.path / 'config.yaml'}: a configuration is a mapping of keys to values")
    return text, config


def _steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Metrics rows by step; of a step that is there twice, the later one."""
    rows = folder.rows("metrics.jsonl", "there are no curves.")
    by_step = {value(row, "step"): row for row in rows if math.isfinite(value(row, "step"))}
    return [by_step[step] for step in sorted(by_step)]


def _facts(rows: Sequence[Row], steps: Any) -> list[tuple[str, str]]:
    if not rows:
        return [("steps", f"0 of {steps}")]
    facts = [("steps", f"{int(rows[-1]['step'])} of {steps}")]
    seconds = [value(row, "step_s") for row in rows if math.isfinite(value(row, "step_s"))]
    rates = sorted(value(row, "samples_per_s") for row in rows if math.isfinite(value(row, "samples_per_s")))
    lags = [value(row, "lag_steps_max") for row in rows if math.isfinite(value(row, "lag_steps_max"))]
    if seconds:
        facts.append(("time in steps", f"{sum(seconds) / 60:.1f} min"))
    if rates:
        facts.append(("samples/s, median step", number(rates[len(rates) // 2])))
    if lags:
        facts.append(("largest lag, steps", number(max(lags))))
    return facts


def _when(event: Row) -> str:
    time = event.get("time", "")
    if isinstance(time, int | float) and 0 < time < 1e11:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return str(time)
