"""Samples per second of a real run, and where its seconds go: generating, scoring, learning, broadcasting, waiting.

    python -m benchmarks.throughput [--config examples/quickstart.yaml] [--steps 8] [--lags 0 1] [key=value ...]
    python -m benchmarks.throughput --runs runs/quickstart

Trains on the configured model with the real parts, or takes runs that are there, and reads their metrics.jsonl. The
first step is left out: it pays for memory and compiled kernels once. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.doctor.software import versions

# Measured wall seconds of a step, and what they mean.
PARTS = {
    "generate_s": "generating (any engine busy)",
    "score_s": "scoring (any response being scored)",
    "learn_s": "learning (forward, backward, optimizer)",
    "publish_s": "publishing (weights gathered, encoded, handed over)",
    "wait_s": "learner waiting for a batch",
    "generation_paused_s": "requests held for new weights",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="examples/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1], help="max_lag_steps values to compare")
    parser.add_argument("--runs", type=Path, nargs="+", help="run directories to read instead of training")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.runs:
        results = {str(folder): later_rows(folder) for folder in arguments.runs}
    else:
        overrides = arguments.overrides
        results = {
            f"max_lag_steps {lag}": run(arguments.config, arguments.steps, lag, overrides) for lag in arguments.lags
        }
    print(report(results))


def run(config: str, steps: int, lag: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Metrics rows of one run, without its first step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output_dir={folder}/run",
            f"steps={steps}",
            f"streaming.max_lag_steps={lag}",
            f"checkpoint.every_steps={steps}",
            "preferences.simulate.pairs=64",
            "prompts.eval_count=8",
            *overrides,
        ]
        subprocess.run([sys.executable, "-m", "cluster.cli", "train", config, *settings], check=True)
        return later_rows(Path(folder, "run"))


def later_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl after the first."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: one column a run, medians over steps."""
    steps = " and ".join(sorted({str(len(rows)) for rows in results.values()}))
    lines = [
        ", ".join(f"{name} {value}" for name, value in versions().items()),
        "",
        f"`python -m benchmarks.throughput {' '.join(sys.argv[1:])}`, {steps} steps after the first",
        "",
        f"| median over steps | {' | '.join(results)} |",
        "| --- |" + " ---: |" * len(results),
        _row("samples per second", results, "samples_per_s"),
        _row("step, seconds", results, "step_s"),
        *(_row(meaning + ", seconds", results, key) for key, meaning in PARTS.items()),
        _row("learner busy, share", results, "learner_busy_fraction"),
        _row("engines idle, share", results, "rollout_idle_fraction"),
        _row("response tokens, mean", results, "response_tokens_mean"),
    ]
    return "\n".join(lines)


def _row(label: str, results: dict[str, list[dict[str, Any]]], key: str) -> str:
    cells = (f"{statistics.median(row[key] for row in rows):.2f}" for rows in results.values())
    return f"| {label} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
