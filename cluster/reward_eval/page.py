"""The page of a reward model's evaluation: self-contained HTML in the style of a run's report."""

from __future__ import annotations

import io
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from cluster.report.curves import GRID, INK, SERIES, STYLE, inline_svg
from cluster.report.sentences import number
from cluster.reward_eval.numbers import Calibration, Share

if TYPE_CHECKING:
    from cluster.reward_eval.command import RewardEvaluation

_FOLDERS = [Path(__file__).parent, Path(__file__).parent.parent / "report"]


def write_page(evaluation: RewardEvaluation, path: Path) -> None:
    """Write the page whole or not at all."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDERS),
        autoescape=True,  # not select_autoescape: it goes by the ending, and .j2 is none it knows
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("reward_eval.html.j2")
    page = template.render(
        evaluation=evaluation, headline=headline(evaluation), doubts=doubts(evaluation), number=number,
        plots=[
            ("Bins of equal width", evaluation.calibration, reliability(evaluation.calibration, "width")),
            ("Bins of equal numbers of pairs", evaluation.adaptive_calibration,
             reliability(evaluation.adaptive_calibration, "mass")),
        ],
        written=datetime.now(UTC),
    )  # fmt: skip
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(page.encode("utf-8", errors="replace"))  # a lone surrogate in a domain's name is no UTF-8
    os.replace(partial, path)


def headline(evaluation: RewardEvaluation) -> str:
    """The one thing to know, also where it is bad news."""
    accuracy = evaluation.overall.accuracy
    right = f"Right on {_percent(accuracy)} of {accuracy.pairs:,} pairs, {accuracy.prompts:,} prompts"
    if accuracy.low <= 0.5:
        return f"{right}: not distinguishable from guessing."
    best = max(evaluation.baselines, key=lambda baseline: baseline.quality.accuracy.value)
    if best.behind_by.direction > 0:
        return f"{right}: better than guessing, and than {best.name}."
    return f"{right}: better than guessing, not distinguishably better than {best.name}."


def doubts(evaluation: RewardEvaluation) -> list[str]:
    """Reasons to believe the reward model less than its accuracy suggests."""
    found = []
    longer, shorter, matched = (evaluation.lengths[name] for name in ("longer", "shorter", "matched"))
    if longer.pairs and shorter.pairs and (longer.low > shorter.high or shorter.low > longer.high):
        favoured = "longer" if longer.value > shorter.value else "shorter"
        found.append(
            f"It leans to {favoured} answers: right on {_percent(longer)} where the better answer is the longer one, "
            f"on {_percent(shorter)} where it is the shorter."
        )
    if matched.pairs and matched.low <= 0.5:
        found.append(f"Among answers of like length it is right on {_percent(matched)}: perhaps by chance.")
    for name, calibration in (("", evaluation.calibration), (" (adaptive)", evaluation.adaptive_calibration)):
        if calibration.error > calibration.chance_limit:
            found.append(
                f"Its probabilities are off: calibration error{name} {number(calibration.error)}; exact ones would "
                f"give {number(calibration.by_chance)}, more than {number(calibration.chance_limit)} once in 20 times."
            )
    loss = evaluation.overall.log_loss
    if loss.low > 0.6931:
        found.append(f"Its log loss of {number(loss.mean)} is above that of knowing nothing (0.693): it is too sure.")
    asked = evaluation.invariance
    if asked.swapped_rankings or asked.alone_rankings:
        found.append(
            f"Of {asked.pairs} pairs asked again, {asked.swapped_rankings} were ranked otherwise with swapped sides "
            f"and {asked.alone_rankings} when scored alone."
        )
    new = evaluation.new_labels
    if new is not None and new.accuracy.high < evaluation.overall.accuracy.low:
        found.append(
            f"On new labels it is right on {_percent(new.accuracy)}, clearly less than on the others: "
            f"{_percent(evaluation.overall.accuracy)}."
        )
    weak = [name or "no domain" for name, each in evaluation.domains.items() if each.accuracy.low <= 0.5]
    if weak and len(evaluation.domains) > 1:
        found.append(f"Not distinguishable from guessing in {', '.join(weak)}.")
    lost = [each.domain or "no domain" for each in evaluation.left_out if each.loss_of_accuracy.direction > 0]
    if lost:
        found.append(f"What is learned elsewhere does not carry over to {', '.join(lost)}.")
    return found


def _percent(share: Share) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def reliability(calibration: Calibration, name: str) -> Markup:
    """Claimed against found, with the interval of each bin; the diagonal is where they agree."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0.5, 1], [0.5, 1], color=GRID, linewidth=1.2)
        claimed = [each.confidence for each in calibration.bins]
        found = [each.agreement.value for each in calibration.bins]
        bars = [
            [each.agreement.value - each.agreement.low for each in calibration.bins],
            [each.agreement.high - each.agreement.value for each in calibration.bins],
        ]
        axes.errorbar(claimed, found, yerr=bars, color=SERIES[0], marker="o", markersize=4, linewidth=1.4,
                      elinewidth=1, capsize=2)  # fmt: skip
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence claimed", color=INK)
        axes.set_ylabel("labels that agree", color=INK)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    points = "; ".join(f"claimed {c:.2f}, found {f:.2f}" for c, f in zip(claimed, found, strict=True))
    return inline_svg(text.getvalue(), f"reliability-{name}", f"Reliability: {points}.")
