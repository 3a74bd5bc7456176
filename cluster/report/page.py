"""report.html: what a run did, on one page that opens anywhere and fetches nothing.

`write_report` reads whatever the run has left in its folder. Only config.yaml is required: the report of an
interrupted run says what is missing and what therefore is not known. Numbers are shown rounded; the exact ones
are in the page too (`<data value=...>`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from cluster.report.curves import curves
from cluster.report.events import happenings, totals
from cluster.report.run_files import Evaluation, Preferences, Rounds, Row, RunFolder, value
from cluster.report.sentences import decided_by, headline, number, sentence, verdict, warning
from contracts.config import ConfigError


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
    rounds = None
    if config.get("loop") or (run_dir / "rounds.json").exists():
        rounds = folder.record("rounds.json", Rounds, "nothing about the rounds of the loop.")
    environment = folder.json("environment.json", "versions and machine are not known.")
    main, others = curves(rows, held_out=_held_out(config))
    reasons = Counter(str(row.get("reason", "no reason given")) for row in folder.rows("quarantine.jsonl"))
    events = folder.rows("events.jsonl")
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
        warning=warning(evaluation), preferences=preferences, rounds=rounds, curves=main, other_curves=others,
        environment=environment if isinstance(environment, dict) else {}, quarantine=reasons.most_common(),
        events=happenings(events), event_totals=totals(events), written=datetime.now(UTC),
        number=number, sentence=sentence, verdict=verdict, decided_by=decided_by, when=_when,
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


def _held_out(config: dict[str, Any]) -> list[str]:
    """Components of the reward that are scored and not trained on."""
    rewards = config.get("rewards")
    components = [each for each in rewards if isinstance(each, dict)] if isinstance(rewards, list) else []
    return [str(each.get("name")) for each in components if each.get("weight") == 0]


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


def _when(time: object) -> str:
    if isinstance(time, int | float) and 0 < time < 1e11:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return str(time)
